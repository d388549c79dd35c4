"""Which tokens of one prompt answer to which of another."""

from __future__ import annotations

from collections.abc import Sequence

from ..text.encoded_prompt import EncodedPrompt, starts_of

ARTICLES = ("a", "an")
"""Words that are one: which of them is written follows from the word behind it."""


def match_in_order(source: EncodedPrompt, destination: EncodedPrompt) -> list[int]:
    """Find for every position of the source its position in the destination.

    Words are looked for from left to right, each behind the one before it, with "a" and "an" as one
    word; start, end and padding answer to start, end and padding (TIME, section 4).

    Raises:
        ValueError: naming the words of the source that the destination lacks.
    """
    wanted, offered = _with_one_article(source), _with_one_article(destination)
    found: list[int] = list(range(source.first))
    missing: list[int] = []
    begin = destination.first
    for position in range(source.first, source.end):
        at = next(
            (n for n in range(begin, destination.end) if offered[n] == wanted[position]), None
        )
        if at is None:
            missing.append(position)
        else:
            found.append(at)
            begin = at + 1
    if missing:
        raise ValueError(_lacking(source, destination, missing))
    return found + match_tail(source, destination)


def match_tail(source: EncodedPrompt, destination: EncodedPrompt) -> list[int]:
    """Positions in the destination for the source's end and padding; the last one may repeat."""
    last = len(destination.tokens) - 1
    count = len(source.tokens) - source.end
    return [min(destination.end + step, last) for step in range(count)]


def whole_word(prompt: EncodedPrompt, position: int) -> str:
    """The word a token is a part of: its piece, joined with its neighbours of the same word.

    A piece that ends with a space ends a word.
    """
    start = position
    while start > prompt.first and not prompt.pieces[start - 1].endswith(" "):
        start -= 1
    stop = position
    while stop + 1 < prompt.end and not prompt.pieces[stop].endswith(" "):
        stop += 1
    return "".join(prompt.pieces[start : stop + 1]).strip()


def find_phrases(
    prompt: EncodedPrompt, phrase: Sequence[int], other: EncodedPrompt, replacement: Sequence[int]
) -> tuple[slice, slice]:
    """Where two prompts differ: the phrase in one, its replacement in the other.

    Both prompts must otherwise be token for token the same.

    Raises:
        ValueError: when there is no such place.
    """
    words, others = prompt.words, other.words
    for at in starts_of(words, phrase):
        stop, other_stop = at + len(phrase), at + len(replacement)
        swapped = (*words[:at], *replacement, *words[stop:])
        if others == swapped:
            return (
                slice(prompt.first + at, prompt.first + stop),
                slice(other.first + at, other.first + other_stop),
            )
    raise ValueError(
        f"the prompts {prompt.text!r} and {other.text!r} differ in more than one phrase; put the "
        "place for the phrase between spaces"
    )


def contains(words: Sequence[int], phrase: Sequence[int]) -> bool:
    """Whether a phrase's tokens stand somewhere in a row."""
    return len(phrase) > 0 and bool(starts_of(words, phrase))


def _with_one_article(prompt: EncodedPrompt) -> list[int | str]:
    # The tokens, "a" and "an" made equal where they are words by themselves.
    return [
        ARTICLES[0] if _is_article(prompt, at) else token for at, token in enumerate(prompt.tokens)
    ]


def _is_article(prompt: EncodedPrompt, at: int) -> bool:
    if not prompt.first <= at < prompt.end:
        return False
    piece = prompt.pieces[at].strip().lower()
    return piece in ARTICLES and whole_word(prompt, at).lower() == piece


def _lacking(source: EncodedPrompt, destination: EncodedPrompt, missing: Sequence[int]) -> str:
    words = list(dict.fromkeys(whole_word(source, at) for at in missing))
    if len(words) == 1:
        named = f"the word {words[0]!r} of the source {source.text!r} is"
    else:
        named = f"the words {', '.join(map(repr, words))} of the source {source.text!r} are"
    return (
        f"{named} missing in the destination {destination.text!r} (or in another order); "
        "write the destination as the source with words added"
    )
