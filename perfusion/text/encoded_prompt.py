"""A prompt as a model gets it, and which of its tokens answer to which of another prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """One prompt's tokens and encodings.

    Attributes:
        text: the prompt.
        tokens: N ids, start, end and padding included; equal ids are equal tokens.
        pieces: what a person reads for each of the N tokens.
        first: position of the first word (1 behind a start token, else 0).
        end: position of the end token; padding follows.
        encodings: (N, D).

    Raises:
        ValueError: for pieces or encodings of another number, and for positions out of order.
    """

    text: str
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    first: int
    end: int
    encodings: Tensor

    def __post_init__(self) -> None:
        count = len(self.tokens)
        if len(self.pieces) != count or self.encodings.shape[:-1] != (count,):
            raise ValueError(
                f"expected as many pieces and encodings as tokens ({count}), found "
                f"{len(self.pieces)} and {tuple(self.encodings.shape)}"
            )
        if not 0 <= self.first <= self.end < count:
            raise ValueError(
                f"expected 0 <= first <= end < {count}, found {self.first} and {self.end}"
            )

    @property
    def words(self) -> tuple[int, ...]:
        """The tokens of the text itself."""
        return self.tokens[self.first : self.end]

    @property
    def last_word(self) -> int:
        """Position of the last token of the text."""
        return self.end - 1


EncodePrompts = Callable[[Sequence[str]], list[EncodedPrompt]]
"""Encodes prompts in the way that conditions the model to be edited."""


def check_prompt(role: str, text: str) -> str:
    """The prompt without outer spaces.

    Raises:
        ValueError: naming its role when nothing is left.
    """
    stripped = text.strip()
    if not stripped:
        raise ValueError(f"the {role} is empty: write a word or a phrase")
    return stripped


def match_in_order(source: EncodedPrompt, destination: EncodedPrompt) -> list[int]:
    """For every position of the source, its position in the destination.

    Words are looked for from left to right, each behind the one before it; start, end and padding
    answer to start, end and padding (TIME, section 4).

    Raises:
        ValueError: naming the first word of the source that the destination lacks.
    """
    found: list[int] = list(range(source.first))
    at = destination.first
    for position in range(source.first, source.end):
        token = source.tokens[position]
        while at < destination.end and destination.tokens[at] != token:
            at += 1
        if at == destination.end:
            raise ValueError(
                f"the word {whole_word(source, position)!r} of the source {source.text!r} is "
                f"missing in the destination {destination.text!r} (or stands in another order); "
                "write the destination as the source with words added"
            )
        found.append(at)
        at += 1
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

    Raises:
        ValueError: when there is no such place, or the prompts are not otherwise token for token
            the same.
    """
    words, others = prompt.words, other.words
    for at in starts_of(words, phrase):
        rest = words[at + len(phrase) :]
        if others == (*words[:at], *replacement, *rest):
            return (
                slice(prompt.first + at, prompt.first + at + len(phrase)),
                slice(other.first + at, other.first + at + len(replacement)),
            )
    raise ValueError(
        f"the prompts {prompt.text!r} and {other.text!r} differ in more than one phrase; put the "
        "place for the phrase between spaces"
    )


def contains(row: Sequence[int], phrase: Sequence[int]) -> bool:
    """Whether a phrase's tokens stand somewhere in a row."""
    return bool(starts_of(row, phrase))


def starts_of(row: Sequence[object], phrase: Sequence[object]) -> list[int]:
    """Every position in a row of tokens at which a phrase's tokens begin."""
    count, wanted = len(phrase), list(phrase)
    return [at for at in range(len(row) - count + 1) if list(row[at : at + count]) == wanted]
