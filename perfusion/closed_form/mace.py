"""Erasing words: MACE's refinement of what stands around them, UCE's replacement of the words.

Both say what a target phrase shall be instead, its anchor: a super-category ("cat -> animal") or
something generic.

- Refinement (MACE, section 3.1): in a prompt, the words around a phrase carry its meaning too. For
  many sentences, every token but the phrase's own gets the keys and values it has when the anchor
  stands in the phrase's place. In MACE the phrase itself is then dealt with by training; the closed
  form alone leaves it as it is.
- Replacement (UCE, section 4): the last token of the phrase gets the keys and values of the
  anchor's last token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..text.encoded_prompt import (
    EncodedPrompt,
    EncodePrompts,
    check_prompt,
    contains,
    find_phrases,
    match_tail,
)
from ..text.prompts import check_templates, fill
from .solver import Constraints

GENERIC_ANCHOR = "thing"
"""What a target without an anchor becomes."""
ARROW = "->"

SENTENCES: tuple[str, ...] = (
    "{}",
    "a {}",
    "the {}",
    "a photo of a {}",
    "a photo of the {}",
    "a picture of a {}",
    "an image of a {}",
    "a photograph of a {}",
    "a close-up of a {}",
    "a portrait of a {}",
    "a painting of a {}",
    "a drawing of a {}",
    "a sketch of a {}",
    "a cartoon of a {}",
    "an illustration of a {}",
    "a small {}",
    "a large {}",
    "an old {}",
    "a beautiful {}",
    "a {} on the beach",
    "a {} in the forest",
    "a {} in the city",
    "a {} in the snow",
    "a {} in the desert",
    "a {} in space",
    "a {} in a room",
    "a {} at night",
    "a {} on a table",
    "a {} next to a tree",
    "two people looking at a {}",
    "a photo of a {} in the mountains",
    "a photo of a {} on the street",
    "a person with a {}",
    "a {} in front of a house",
)
"""Sentences with one place for a phrase (MACE uses about thirty)."""


_Choice = Callable[[EncodedPrompt, EncodedPrompt, slice, slice], Constraints]


@dataclass(frozen=True)
class Erasure:
    """A phrase to erase and what shall take its place."""

    target: str
    anchor: str = GENERIC_ANCHOR


def parse_erasures(text: str) -> list[Erasure]:
    """One erasure a line, ``target -> anchor``; without an anchor the generic one.

    Raises ValueError for no line at all, a line without a target, a target named twice.
    """
    found: list[Erasure] = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        target, _, anchor = line.partition(ARROW)
        if ARROW in anchor:
            raise ValueError(f"expected one 'target -> anchor' a line, found {line!r}")
        target = check_prompt(f"target in the line {line!r}", target)
        found.append(Erasure(target, anchor.strip() or GENERIC_ANCHOR))
    if not found:
        raise ValueError("expected at least one phrase to erase, found none; write one a line")
    for erasure in found:
        if [each.target.lower() for each in found].count(erasure.target.lower()) > 1:
            raise ValueError(f"the target {erasure.target!r} is named twice; keep one of the lines")
    return found


def check_erasures(
    encode: EncodePrompts, erasures: Sequence[Erasure], preserved: Sequence[str] = ()
) -> None:
    """Refuse what contradicts itself, token by token.

    Raises:
        ValueError: for a target equal to its anchor, an anchor that is erased too, and a target
            that contains a preserved phrase or is contained in one.
    """
    targets = encode([erasure.target for erasure in erasures])
    anchors = encode([erasure.anchor for erasure in erasures])
    kept = encode(list(preserved))
    for target, anchor in zip(targets, anchors, strict=True):
        if target.words == anchor.words:
            raise ValueError(
                f"the target {target.text!r} is equal to its anchor; name a more general word"
            )
        for other in targets:
            if other.words == anchor.words:
                raise ValueError(
                    f"the anchor {anchor.text!r} of {target.text!r} is to be erased itself; "
                    "choose another anchor"
                )
        for phrase in kept:
            if contains(target.words, phrase.words):
                raise ValueError(
                    f"the target {target.text!r} contains the preserved phrase {phrase.text!r}; "
                    "it cannot be erased and preserved, drop one of them"
                )
            if contains(phrase.words, target.words):
                raise ValueError(
                    f"the preserved text {phrase.text!r} contains the target {target.text!r}; "
                    "it cannot be erased and preserved, drop one of them"
                )


def refinement_constraints(
    encode: EncodePrompts, erasures: Sequence[Erasure], sentences: Sequence[str] = SENTENCES
) -> Constraints:
    """MACE's: every token of the sentences but the phrases' own, as if the anchor stood there."""
    return _over_sentences(encode, erasures, sentences, _around)


def replacement_constraints(
    encode: EncodePrompts, erasures: Sequence[Erasure], sentences: Sequence[str] = ("{}",)
) -> Constraints:
    """UCE's: the last token of each phrase as the last token of its anchor."""
    return _over_sentences(encode, erasures, sentences, _last)


def _over_sentences(
    encode: EncodePrompts, erasures: Sequence[Erasure], sentences: Sequence[str], choose: _Choice
) -> Constraints:
    check_templates(sentences)
    parts = []
    for erasure in erasures:
        phrase, replacement = (each.words for each in encode([erasure.target, erasure.anchor]))
        before = encode([fill(sentence, erasure.target) for sentence in sentences])
        after = encode([fill(sentence, erasure.anchor) for sentence in sentences])
        for source, destination in zip(before, after, strict=True):
            places = find_phrases(source, phrase, destination, replacement)
            parts.append(choose(source, destination, *places))
    return Constraints.join(parts)


def _around(
    source: EncodedPrompt, destination: EncodedPrompt, phrase: slice, replacement: slice
) -> Constraints:
    shift = replacement.stop - phrase.stop
    positions = [*range(phrase.start), *range(phrase.stop, source.end)]
    matched = [at if at < phrase.start else at + shift for at in positions]
    positions += range(source.end, len(source.tokens))
    matched += match_tail(source, destination)
    return Constraints(source.encodings[positions], destination.encodings[matched])


def _last(
    source: EncodedPrompt, destination: EncodedPrompt, phrase: slice, replacement: slice
) -> Constraints:
    return Constraints(
        source.encodings[[phrase.stop - 1]], destination.encodings[[replacement.stop - 1]]
    )
