"""A prompt as a model gets it: tokens, pieces, encodings."""

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
        pieces: what a person reads for each of the N tokens; one that ends a word ends in a space.
        first: position of the first word: behind a start token or what a template puts first.
        end: position behind the last word: of the end token, a template's rest or padding, if the
            text encoder puts any there, else N.
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
        if not 0 <= self.first <= self.end <= count:
            raise ValueError(
                f"expected 0 <= first <= end <= {count}, found {self.first} and {self.end}"
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


def starts_of(row: Sequence[object], phrase: Sequence[object]) -> list[int]:
    """Every position in a row of tokens at which a phrase's tokens begin."""
    count, wanted = len(phrase), list(phrase)
    return [at for at in range(len(row) - count + 1) if list(row[at : at + count]) == wanted]
