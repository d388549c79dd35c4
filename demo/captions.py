"""Captions of the small world: what a picture shows, said in one of many ways."""

import random
import re

from .classes import CLASS_NAMES, KINDS
from .specs import COLOR_NAMES, SCENES, STYLES, UNNAMED_COLOR, Specs, sample_specs
from .sprites import PATTERNS

PATTERN_WORDS = {"striped": ("striped", "stripy"), "spotted": ("spotted", "dotted")}
SCENE_WORDS = {
    "beach": ("on the beach", "at the beach", "by the sea"),
    "snow": ("in the snow", "on a snowy day"),
    "forest": ("in the forest", "in the woods"),
    "desert": ("in the desert", "on a dune"),
    "city": ("in the city", "on the street"),
    "space": ("in space", "in outer space"),
}
STYLE_WORDS = {
    "photo": (
        "a photo of",
        "a picture of",
        "a photograph of",
        "an image of",
        "a nice photo of",
        "a good photo of",
        "a close-up photo of",
    ),
    "sketch": ("a sketch of", "a drawing of", "a pencil drawing of"),
}
SIZE_WORDS = (("small", "little", "tiny"), (), ("big", "large", "huge"), ())
FILLERS = ("nice", "cute", "cool", "lovely", "good", "weird")
DETERMINERS = ("the", "my", "one", "this")
MARK = "#"
"""In marked captions, between a word and the number of the thing that it says something about."""


def _thing(specs: Specs, picture: int, place: int, rng: random.Random) -> str:
    kind = KINDS[CLASS_NAMES[int(specs.kind[picture, place])]]
    words = []
    sizes = SIZE_WORDS[int(specs.size_class[picture, place])]
    if sizes and not bool(specs.two[picture]) and rng.random() < 0.35:
        words.append(rng.choice(sizes))
    color = int(specs.color[picture, place])
    if color < UNNAMED_COLOR and rng.random() < 0.6:
        words.append(COLOR_NAMES[color])
    pattern = PATTERNS[int(specs.pattern[picture, place])]
    if pattern in PATTERN_WORDS and rng.random() < 0.75:
        words.append(rng.choice(PATTERN_WORDS[pattern]))
    words.append(kind.words[0] if rng.random() < 0.75 else kind.words[-1])
    if rng.random() < 0.1:
        words.insert(0, rng.choice(FILLERS))
    said = [word for word in words if word not in FILLERS]
    words = [f"{word}{MARK}{place}" if word in said else word for word in words]
    article = "an" if words[0][0] in "aeiou" else "a"
    if rng.random() < 0.15:
        article = rng.choice(DETERMINERS)
    return " ".join([article, *words])


def _things(specs: Specs, picture: int, rng: random.Random, place_first: bool) -> str:
    first = _thing(specs, picture, 0, rng)
    if not bool(specs.two[picture]):
        return first
    both = [first, _thing(specs, picture, 1, rng)]
    left, right = both if bool(specs.first_is_left[picture]) else both[::-1]
    way = rng.random()
    if way < 0.5:
        rng.shuffle(both)
        return both[0] + rng.choice((" and ", " next to ")) + both[1]
    if way < 0.75:
        return f"{left} on the left and {right} on the right"
    if place_first:  # only so can a text encoder that reads from the left put them in place
        return f"on the left {left} and on the right {right}"
    return f"{right} on the right and {left} on the left"


def _marked_caption(specs: Specs, picture: int, rng: random.Random, place_first: bool) -> str:
    style = STYLES[int(specs.style[picture])]
    start = rng.choice(STYLE_WORDS[style])
    if style == "photo" and rng.random() < 0.2:
        start = ""
    scene = SCENES[int(specs.scene[picture])]
    end = rng.choice(SCENE_WORDS[scene]) if scene in SCENE_WORDS and rng.random() < 0.92 else ""
    comma = "," if end and rng.random() < 0.1 else ""
    return f"{start} {_things(specs, picture, rng, place_first)}{comma} {end}".strip()


def marked_captions(specs: Specs, seed: int, place_first: bool = True) -> list[str]:
    """``captions`` with every word about a thing marked: "a red#0 cat#0 next to a mug#1".

    Without ``place_first`` no caption says where a thing is before it names the thing.
    """
    rng = random.Random(seed)
    return [_marked_caption(specs, i, rng, place_first) for i in range(len(specs))]


def captions(specs: Specs, seed: int) -> list[str]:
    """One caption for each picture, reproducible from the seed."""
    return [re.sub(MARK + "[01]", "", text) for text in marked_captions(specs, seed)]


def sample_captions(count: int, seed: int = 0) -> list[str]:
    """Captions of random pictures, for statistics of the text encoder."""
    return captions(sample_specs(count, seed), seed)


def vocabulary() -> list[str]:
    """Every word (and the comma) that captions are made of, sorted."""
    phrases = [word for kind in KINDS.values() for word in kind.words]
    for table in (PATTERN_WORDS, SCENE_WORDS, STYLE_WORDS):
        phrases += [phrase for group in table.values() for phrase in group]
    phrases += [
        *COLOR_NAMES,
        *FILLERS,
        *DETERMINERS,
        "a",
        "an",
        "and",
        "next to",
        "left",
        "right",
        "on the",
        ",",
    ]
    phrases += [word for group in SIZE_WORDS for word in group]
    return sorted({word for phrase in phrases for word in phrase.split()})
