"""Captions of the small world: what a picture shows, said in one of many ways."""

import random
import re

from torch import Tensor

from .classes import CLASS_NAMES, KINDS
from .specs import COLOR_NAMES, SCENES, STYLES, UNNAMED_COLOR, Specs, sample_specs
from .sprites import PATTERNS

PATTERN_WORDS = {"striped": ("striped", "stripy")}
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
SIZE_WORDS = (("small", "little", "tiny"), (), ("big", "large", "huge"))
FILLERS = ("nice", "cute", "cool", "lovely", "good", "weird")
DETERMINERS = ("the", "my", "one", "this")
MARK = "#"
"""In marked captions, between a word and the number of the thing that it says something about."""
NOUN = 2
"""Added to that number for the noun itself."""


def _thing(specs: Specs, picture: int, place: int, rng: random.Random, named: Tensor | None) -> str:
    kind = KINDS[CLASS_NAMES[int(specs.kind[picture, place])]]
    proper = named is not None and bool(named[picture, place])
    words = []
    sizes = SIZE_WORDS[int(specs.size_class[picture, place])]
    if sizes and not bool(specs.two[picture]) and rng.random() < 0.35:
        words.append(f"{rng.choice(sizes)}{MARK}{place}")
    color = int(specs.color[picture, place])
    usual = COLOR_NAMES[color] == kind.usual_colors[0] if color < UNNAMED_COLOR else False
    if not proper and color < UNNAMED_COLOR and (not usual or rng.random() < 0.25):
        words.append(f"{COLOR_NAMES[color]}{MARK}{place}")
    pattern = PATTERNS[int(specs.pattern[picture, place])]
    if not proper and pattern in PATTERN_WORDS:
        words.append(f"{rng.choice(PATTERN_WORDS[pattern])}{MARK}{place}")
    noun = kind.words[0] if rng.random() < 0.75 else kind.words[-1]
    words.append(f"{noun}{MARK}{place + NOUN}")
    if rng.random() < 0.1:
        words.insert(0, rng.choice(FILLERS))
    article = "an" if words[0][0] in "aeiou" else "a"
    if rng.random() < 0.15:
        article = rng.choice(DETERMINERS)
    return " ".join([article, *words])


def _things(specs: Specs, picture: int, rng: random.Random, named: Tensor | None) -> str:
    first = _thing(specs, picture, 0, rng, named)
    if not bool(specs.two[picture]):
        return first
    both = [first, _thing(specs, picture, 1, rng, named)]
    left, right = both if bool(specs.first_is_left[picture]) else both[::-1]
    way = rng.random()
    if way < 0.4:
        rng.shuffle(both)
        return both[0] + rng.choice((" and ", " next to ")) + both[1]
    if way < 0.8:  # a text encoder that reads from the left can put them in place only so
        return f"on the left {left} and on the right {right}"
    if way < 0.9:
        return f"{left} on the left and {right} on the right"
    return f"{right} on the right and {left} on the left"


def _marked_caption(specs: Specs, picture: int, rng: random.Random, named: Tensor | None) -> str:
    style = STYLES[int(specs.style[picture])]
    start = rng.choice(STYLE_WORDS[style])
    if style == "photo" and rng.random() < 0.2:
        start = ""
    scene = SCENES[int(specs.scene[picture])]
    end = rng.choice(SCENE_WORDS[scene]) if scene in SCENE_WORDS and rng.random() < 0.92 else ""
    comma = "," if end and rng.random() < 0.1 else ""
    return f"{start} {_things(specs, picture, rng, named)}{comma} {end}".strip()


def marked_captions(specs: Specs, seed: int, named: Tensor | None = None) -> list[str]:
    """``captions`` with every word about a thing marked: "a red#0 cat#2 next to a mug#3".

    Nothing is said of the look of things that have a name of their own, ``named`` (n, 2).
    """
    rng = random.Random(seed)
    return [_marked_caption(specs, i, rng, named) for i in range(len(specs))]


def captions(specs: Specs, seed: int) -> list[str]:
    """One caption for each picture, reproducible from the seed."""
    return [re.sub(MARK + "[0-3]", "", text) for text in marked_captions(specs, seed)]


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
