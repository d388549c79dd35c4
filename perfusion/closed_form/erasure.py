"""What to erase: phrases, what shall take their place, and where both stand in sentences.

A phrase's anchor says what it shall be instead: a super-category ("cat -> animal") or something
generic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..text.encoded_prompt import EncodedPrompt, EncodePrompts, check_prompt
from ..text.lines import lines_of
from ..text.prompts import check_templates, fill
from .matching import contains, find_phrases, words_of

GENERIC_ANCHOR = "thing"
"""What a target without an anchor becomes."""
ARROW = "->"


@dataclass(frozen=True)
class Erasure:
    """A phrase to erase and what shall take its place.

    Attributes:
        target: the phrase.
        anchor: what it shall mean instead: a super-category, or something generic.
    """

    target: str
    anchor: str = GENERIC_ANCHOR


def parse_erasures(text: str) -> list[Erasure]:
    """One erasure a line, ``target -> anchor``; without an anchor the generic one.

    Raises:
        ValueError: for no line at all, a line without a target, a target named twice.
    """
    found: list[Erasure] = []
    for line in lines_of(text):
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
    """Refuse what contradicts itself, word by word as the text encoder reads them.

    Raises:
        ValueError: for a target equal to its anchor, an anchor that is erased too, and a target
            that contains a preserved phrase or is contained in one.
    """
    targets = _phrases(encode, [erasure.target for erasure in erasures])
    anchors = _phrases(encode, [erasure.anchor for erasure in erasures])
    kept = _phrases(encode, preserved)
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


@dataclass(frozen=True)
class _Phrase:
    text: str
    words: tuple[str, ...]


def _phrases(encode: EncodePrompts, texts: Sequence[str]) -> list[_Phrase]:
    return [
        _Phrase(each.text, tuple(word.text for word in words_of(each)))
        for each in encode(list(texts))
    ]


@dataclass(frozen=True, eq=False)
class Swap:
    """One sentence with the phrase and the same with its anchor.

    Attributes:
        source: the sentence with the phrase.
        destination: the sentence with the anchor.
        phrase: positions of the phrase in the source.
        anchor: positions of the anchor in the destination.
    """

    source: EncodedPrompt
    destination: EncodedPrompt
    phrase: slice
    anchor: slice


def swaps(
    encode: EncodePrompts, erasures: Sequence[Erasure], sentences: Sequence[str]
) -> Iterator[Swap]:
    """Every sentence (with one ``{}`` each) for every erasure, one erasure after the other.

    Raises:
        ValueError: for a sentence that has not one place for the phrase.
    """
    check_templates(sentences)
    for erasure in erasures:
        phrase, anchor = (each.words for each in _phrases(encode, [erasure.target, erasure.anchor]))
        before = encode([fill(sentence, erasure.target) for sentence in sentences])
        after = encode([fill(sentence, erasure.anchor) for sentence in sentences])
        for source, destination in zip(before, after, strict=True):
            places = find_phrases(source, phrase, destination, anchor)
            yield Swap(source, destination, *places)
