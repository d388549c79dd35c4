"""Which tokens of one prompt answer to which of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..text.encoded_prompt import EncodedPrompt, starts_of

ARTICLES = ("a", "an")
"""Words that are one: which of them is written follows from the word behind it."""


@dataclass(frozen=True)
class Word:
    """One word of a prompt.

    Attributes:
        text: as it is read.
        start, stop: positions of its tokens.
    """

    text: str
    start: int
    stop: int


def words_of(prompt: EncodedPrompt) -> list[Word]:
    """The words of a prompt's text, in order.

    Tokenizers cut a word at the start of a text otherwise than within it; words are the same.
    """
    found: list[Word] = []
    start = prompt.first
    for position in range(prompt.first, prompt.end):
        if prompt.pieces[position].endswith(" ") or position + 1 == prompt.end:
            stop = position + 1
            found.append(Word("".join(prompt.pieces[start:stop]).strip(), start, stop))
            start = stop
    return found


def match_in_order(source: EncodedPrompt, destination: EncodedPrompt) -> list[int]:
    """Find for every position of the source its position in the destination.

    Words are looked for from left to right, each behind the one before it, with "a" and "an" as one
    word; a word that is part of a longer one is found by its tokens. Start, end and padding answer
    to start, end and padding (TIME, section 4).

    Raises:
        ValueError: naming the words of the source that the destination lacks.
    """
    offered = words_of(destination)
    found: list[int] = list(range(source.first))
    missing: list[str] = []
    begin = destination.first
    for word in words_of(source):
        places = _same_word(word, offered, begin) or _same_tokens(source, destination, word, begin)
        if places:
            found += places
            begin = places[-1] + 1
        else:
            missing.append(word.text)
    if missing:
        raise ValueError(_lacking(source, destination, missing))
    return found + match_tail(source, destination)


def _same_word(word: Word, offered: Sequence[Word], begin: int) -> list[int]:
    wanted = _one_article(word.text)
    for other in offered:
        if other.start >= begin and _one_article(other.text) == wanted:
            # Cut into other tokens at another place: the last ones, which end the word, first.
            shift = other.stop - word.stop
            return [max(at + shift, other.start) for at in range(word.start, word.stop)]
    return []


def _same_tokens(
    source: EncodedPrompt, destination: EncodedPrompt, word: Word, begin: int
) -> list[int]:
    found: list[int] = []
    for token in source.tokens[word.start : word.stop]:
        places = range(begin, destination.end)
        at = next((at for at in places if destination.tokens[at] == token), None)
        if at is None:
            return []
        found.append(at)
        begin = at + 1
    return found


def match_tail(source: EncodedPrompt, destination: EncodedPrompt) -> list[int]:
    """Positions in the destination for the source's end and padding; the last one may repeat."""
    last = len(destination.tokens) - 1
    count = len(source.tokens) - source.end
    return [min(destination.end + step, last) for step in range(count)]


def find_phrases(
    prompt: EncodedPrompt, phrase: Sequence[str], other: EncodedPrompt, replacement: Sequence[str]
) -> tuple[slice, slice]:
    """Where two prompts differ: the phrase in one, its replacement in the other.

    Args:
        prompt: holds the phrase.
        phrase: its words.
        other: the same prompt with the replacement in the phrase's place.
        replacement: its words.

    Returns:
        Their positions in the prompt and in the other.

    Raises:
        ValueError: when there is no such place, or the prompts are not otherwise word for word the
            same.
    """
    words, others = words_of(prompt), words_of(other)
    texts, other_texts = [word.text for word in words], [word.text for word in others]
    for at in starts_of(texts, phrase) if phrase and replacement else ():
        stop, other_stop = at + len(phrase), at + len(replacement)
        if other_texts == [*texts[:at], *replacement, *texts[stop:]]:
            return (
                slice(words[at].start, words[stop - 1].stop),
                slice(others[at].start, others[other_stop - 1].stop),
            )
    raise ValueError(
        f"the prompts {prompt.text!r} and {other.text!r} differ in more than one phrase; put the "
        "place for the phrase between spaces"
    )


def contains(words: Sequence[str], phrase: Sequence[str]) -> bool:
    """Whether a phrase's words stand somewhere in a row of words, one behind the other."""
    return len(phrase) > 0 and bool(starts_of(words, phrase))


def _one_article(word: str) -> str:
    return ARTICLES[0] if word.lower() in ARTICLES else word


def _lacking(source: EncodedPrompt, destination: EncodedPrompt, missing: Sequence[str]) -> str:
    words = list(dict.fromkeys(missing))
    if len(words) == 1:
        named = f"the word {words[0]!r} of the source {source.text!r} is"
    else:
        named = f"the words {', '.join(map(repr, words))} of the source {source.text!r} are"
    return (
        f"{named} missing in the destination {destination.text!r} (or in another order); "
        "write the destination as the source with words added"
    )
