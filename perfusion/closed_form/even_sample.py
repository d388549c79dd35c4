"""A few rows out of many that come in parts, spread evenly over all of them."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

Rows = Annotated[Tensor, "n D"]
"""Encodings of single tokens, or what was computed of each, a row a token."""


class EvenSample:
    """Every 2^k-th row of those added, with k as small as the bound allows."""

    def __init__(self, most: int) -> None:
        """Begin with no row.

        Args:
            most: rows to keep at most; at least half as many are kept once there are enough.
        """
        self._most = most
        self._step = 1
        self._seen = 0
        self._kept: tuple[Tensor, ...] = ()

    def add(self, *columns: Tensor) -> None:
        """Add rows; several tensors of one length are sampled at the same places, in fp64."""
        count = len(columns[0])
        chosen = [column[-self._seen % self._step :: self._step] for column in columns]
        self._seen += count
        # Copies, so that what they are rows of can be freed.
        new = [rows.detach().to("cpu", torch.float64, copy=True) for rows in chosen]
        pairs = zip(self._kept, new, strict=True) if self._kept else ((rows,) for rows in new)
        self._kept = tuple(torch.cat(pair) for pair in pairs)
        while len(self._kept[0]) > self._most:
            self._kept = tuple(rows[::2].clone() for rows in self._kept)
            self._step *= 2

    def rows(self) -> tuple[Tensor, ...]:
        """What was kept of each column; nothing at all when nothing was added."""
        return self._kept
