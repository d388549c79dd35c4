"""Edits of keys and values where one linear map makes both."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.networks import FusedPart
from .dispatch import Override, Projection


class FusedProjection:
    """In place of a map that makes keys and values: each share with the edit it has, or without.

    What both shares ask for is computed once.
    """

    def __init__(self) -> None:
        self._edits: dict[FusedPart, Override | None] = {}

    def put(self, part: FusedPart, edit: Override | None) -> None:
        """Say what is done to a share; every share needs it, None for nothing."""
        self._edits[part] = edit

    def apply(self, original: Projection, encodings: Tensor) -> Tensor:
        """Keys and values (B, N, d_K + d_V) of encodings (B, N, D)."""
        made = _Once(original)
        found = []
        for part in sorted(self._edits, key=lambda part: part.start):
            share, edit = share_of(made, part), self._edits[part]
            found.append(share(encodings) if edit is None else edit.apply(share, encodings))
        return torch.cat(found, dim=-1)


class _Once:
    """A projection that is not computed again for the tensor it was last computed for."""

    def __init__(self, original: Projection) -> None:
        self._original = original
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, encodings: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not encodings:
            self._last = encodings, self._original(encodings)
        return self._last[1]


def share_of(original: Projection, part: object) -> Projection:
    """The share of a map's outputs that is meant; all of them for a module of its own."""
    if not isinstance(part, FusedPart):
        return original
    start, stop = part.start, part.stop
    return lambda encodings: original(encodings)[..., start:stop]


def module_of(part: object) -> object:
    """The module whose forward makes a projection."""
    return part.module if isinstance(part, FusedPart) else part
