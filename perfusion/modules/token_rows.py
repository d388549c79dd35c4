"""Finding words in rows of token ids and putting others in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Found:
    """A row of ids with its words taken out.

    ``places`` are the positions of the words as they are when each takes one token, with the
    concept found there; ``rest`` are the other tokens.
    """

    places: tuple[tuple[int, int], ...]
    rest: tuple[int, ...]

    def replaced(self, tokens_of: Callable[[int], Sequence[int]]) -> list[int]:
        """The row with ``tokens_of(concept)`` in each place."""
        row: list[int] = []
        rest = iter(self.rest)
        concepts = dict(self.places)
        for position in range(len(self.rest) + len(self.places)):
            row.extend(tokens_of(concepts[position]) if position in concepts else (next(rest),))
        return row


def occurrences(row: Sequence[int], words: Mapping[int, Sequence[int]]) -> Found:
    """Where ``words`` (concept -> ids of its sub-words, none for no word) stand in a row.

    Of two words that start at one position the longer is meant ("bird" and "birdbath").
    """
    longest_first = sorted(words.items(), key=lambda item: -len(item[1]))
    places: list[tuple[int, int]] = []
    rest: list[int] = []
    position = 0
    while position < len(row):
        for concept, word in longest_first:
            if word and tuple(row[position : position + len(word)]) == tuple(word):
                places.append((len(rest) + len(places), concept))
                position += len(word)
                break
        else:
            rest.append(row[position])
            position += 1
    return Found(tuple(places), tuple(rest))


def cut_to(width: int, row: list[int], pad_id: int, eos_id: int) -> list[int]:
    """The row with ``width`` tokens: padded, or cut so that an end token still ends it."""
    if len(row) <= width:
        return row + [pad_id] * (width - len(row))
    return [*row[: width - 1], eos_id] if eos_id in row else row[:width]


def real_tokens(ids: Tensor, pad_id: int, eos_id: int) -> Tensor:
    """Bool mask (B, N) of the tokens up to the first end token.

    Ids alone cannot tell: CLIP's padding 0 is also its "!", and some pad with the end token.
    Rows without an end token count whatever is not padding.
    """
    ends = ids == eos_id
    before = torch.cumsum(ends, dim=-1) - ends.long() == 0
    return torch.where(rearrange(ends.any(-1), "b -> b 1"), before, ids != pad_id)


def aligned(encodings: Tensor, places: Tensor, extra: int) -> Tensor:
    """Encodings (B, N, D) with ``extra`` sub-words of each row's word taken out.

    The word starts at ``places`` (B,) and its last sub-word stays: encoded from left to right it
    is the only one that has seen the whole word. What follows moves up; the last token repeats.
    """
    if extra == 0:
        return encodings
    count = encodings.shape[1]
    steps = torch.arange(count, device=encodings.device)[None]
    moved = steps + extra * (steps >= rearrange(places, "b -> b 1")).long()
    rows = torch.arange(len(encodings), device=encodings.device)[:, None]
    return encodings[rows, moved.clamp(max=count - 1)]
