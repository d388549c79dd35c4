"""Models that read two encodings of a prompt, of two text encoders, as one row of tokens.

HunyuanDiT reads BERT's tokens and behind them mT5's, which pass a small network on their way. Here
the two are one tensor (B, N1 + N2, D1 + D2): a token fills the columns of its own text encoder and
is zero in the others. So a concept has one direction, with a share in each encoder's space; it is
compared with every token where that token lives, and all else is as with one encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What is known of a token: 1 for a word, and 2 more for one of the second text encoder.
_SECOND = 2


@dataclass(frozen=True)
class SecondText:
    """Where a model's second encoding is.

    Attributes:
        kept: its name in conditionings, and in what the text encoders give.
        masks: names, there, of what says which tokens of the first and of the second are words.
        read: its name in the model's call.
        read_masks: those of the masks.
    """

    kept: str
    masks: tuple[str, str]
    read: str
    read_masks: tuple[str, str]

    def joined_text(self, encodings: Tensor, more: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """What text encoders give as one row of tokens, and what is known of each (B, N)."""
        first, second = (more[name].long() for name in self.masks)
        return joined(encodings, more[self.kept]), torch.cat([first, _SECOND + second], 1)

    def text_apart(
        self, encodings: Tensor, known: Tensor, width: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The reverse: the first encodings (B, N1, width), and by name the second and the masks.

        They are copies, for HunyuanDiT writes into what it reads.
        """
        count = int((known[0] < _SECOND).sum())
        first, second = encodings[:, :count, :width], encodings[:, count:, width:]
        masks = known[:, :count], known[:, count:] - _SECOND
        kept = second.clone(memory_format=torch.contiguous_format)
        named = {self.kept: kept, **dict(zip(self.masks, masks, strict=True))}
        return first.clone(memory_format=torch.contiguous_format), named

    def words_of_call(self, given: Mapping[str, Any]) -> Tensor:
        """Which tokens (B, N1 + N2, 1) of a model's call are words; padding is not read."""
        return torch.cat([given[name].bool() for name in self.read_masks], 1)[..., None]


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Two encodings (B, N1, D1) and (B, N2, D2) as one row of tokens (B, N1 + N2, D1 + D2)."""
    before, behind = first.shape[-1], second.shape[-1]
    pad = torch.nn.functional.pad
    return torch.cat([pad(first, (0, behind)), pad(second.to(first), (before, 0))], 1)


def words_known(known: Tensor) -> Tensor:
    """Which tokens (B, N, 1) are words, of what is known of them (B, N)."""
    return (known % _SECOND).bool()[..., None]
