"""Placeholders in the text of tokenizers to which spaces matter (T5, UMT5, Qwen).

There a word's tokens depend on what stands beside it. So a prompt is cut with the superclass in a
placeholder's place, as it would be without concepts, and then the concept's vector takes the place
of the superclass's tokens. What it took the place of goes with it, for the prompt's twin.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import CLIPTokenizer, Qwen2Tokenizer

Ids = list[int]
_FIRST_MARK = 0xE000
_TAKES_PLACE_OF = "_perfusion_takes_place_of"


@dataclass(frozen=True, eq=False)
class Served:
    """What a placeholder stands for.

    Attributes:
        rows: (n, dim) its vectors; the last one is the concept's.
        superclass: the everyday word.
        last_only: whether only the last of the superclass's tokens gives way to the vector (twin
            lock), not all of them.
    """

    rows: Tensor
    superclass: str
    last_only: bool


def spaces_matter(tokenizer: Any) -> bool:
    """Whether an SDTokenizer cuts a word differently according to the spaces beside it."""
    return not isinstance(tokenizer.tokenizer, CLIPTokenizer)


def mark(at: int) -> str:
    """The character that stands for a placeholder while a prompt's weights are parsed."""
    return chr(_FIRST_MARK + at)


def takes_place_of(token: Any) -> tuple[int, ...]:
    """The superclass's token ids that a vector took the place of; none for anything else."""
    return getattr(token, _TAKES_PLACE_OF, ()) if isinstance(token, Tensor) else ()


def word_text(tokenizer: Any, word: str) -> str:
    """A word as it stands within a sentence: some tokens begin with the space before it."""
    return f" {word}" if isinstance(tokenizer.tokenizer, Qwen2Tokenizer) else word


def in_place_of(token: Tensor, vector: Tensor) -> Tensor:
    """Another vector (dim,) in the place of a placeholder's, of which it keeps the memory."""
    found = vector.view_as(vector)
    setattr(found, _TAKES_PLACE_OF, takes_place_of(token))
    return found


class MarkedWords:
    """Stands in for the tokenizer within an SDTokenizer: `(text) -> {"input_ids": ...}`.

    Args:
        tokenizer: ComfyUI's SDTokenizer.
        served: what each mark stands for.
    """

    def __init__(self, tokenizer: Any, served: Sequence[Served]) -> None:
        self._stock: Callable[[str], Any] = tokenizer.tokenizer
        self._start: int = tokenizer.tokens_start
        self._end = -1 if tokenizer.tokenizer_adds_end_token else None
        self._alone = [word_text(tokenizer, each.superclass) for each in served]
        self._served = served

    def __call__(self, text: str) -> dict[str, list[int | Tensor]]:
        """Token ids and vectors of a text with marks, with the stock start and end tokens."""
        marks = "".join(mark(at) for at in range(len(self._served)))
        pieces = re.split(f"([{marks}])", text)
        literal, words = pieces[::2], [ord(each) - _FIRST_MARK for each in pieces[1::2]]
        whole = literal[0]
        spans: list[tuple[int, int]] = []
        for at, after in zip(words, literal[1:], strict=True):
            superclass = self._served[at].superclass
            spans.append((len(whole), len(whole) + len(superclass)))
            whole += superclass + after
        every: Ids = list(self._stock(whole)["input_ids"])
        head, tail = every[: self._start], every[len(every) :]
        if self._end is not None:
            tail = every[self._end :]
        ids = every[self._start : self._end]
        places = self._places(whole, spans, ids)
        if places is None:
            return {"input_ids": [*head, *self._piece_by_piece(literal, words), *tail]}
        found: list[int | Tensor] = []
        done = 0
        for at, (start, stop) in zip(words, places, strict=True):
            found += ids[done:start]
            found += self._in_place_of(at, ids[start:stop])
            done = stop
        return {"input_ids": [*head, *found, *ids[done:], *tail]}

    def _ids(self, text: str) -> Ids:
        return list(self._stock(text)["input_ids"])[self._start : self._end] if text else []

    def _places(
        self, whole: str, spans: Sequence[tuple[int, int]], ids: Ids
    ) -> list[tuple[int, int]] | None:
        """Where the words' tokens are, None when one shares a token with its neighbours."""
        places = []
        for start, stop in spans:
            before, through = self._ids(whole[:start].rstrip()), self._ids(whole[:stop])
            if through != ids[: len(through)] or before != through[: len(before)]:
                return None
            if len(before) == len(through):
                return None
            places.append((len(before), len(through)))
        return places

    def _piece_by_piece(self, literal: Sequence[str], words: Sequence[int]) -> list[int | Tensor]:
        found: list[int | Tensor] = list(self._ids(literal[0].rstrip()))
        for at, after in zip(words, literal[1:], strict=True):
            found += self._in_place_of(at, self._ids(self._alone[at]))
            found += self._ids(after.rstrip())
        return found

    def _in_place_of(self, at: int, ids: Ids) -> list[int | Tensor]:
        served = self._served[at]
        kept = ids[:-1] if served.last_only else []
        # A tensor of its own: the same row may take the place of other tokens elsewhere.
        vector = served.rows[-1].clone()
        setattr(vector, _TAKES_PLACE_OF, tuple(ids[len(kept) :]))
        return [*kept, vector]
