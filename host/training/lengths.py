"""Prompts of their own lengths, side by side in one batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...perfusion.gated.twin_lock import TwinProjections
from ...perfusion.training.denoiser import Conditioning, Projections


def rows_by_length(
    encoded: Conditioning, edit: Projections | None
) -> Iterator[tuple[Tensor, Conditioning, Projections | None]]:
    """Rows (n,) whose prompts are of one length, with their conditioning and edit so long.

    A prompt ends before the zeros it was filled up with.
    """
    used = (encoded.encodings != 0).any(dim=-1)
    positions = torch.arange(1, used.shape[1] + 1, device=used.device)
    lengths = (used * positions).amax(dim=1).cpu()
    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero()[:, 0]
        chosen = encoded.rows(rows)
        yield (
            rows,
            Conditioning(chosen.encodings[:, :length], chosen.mask[:, :length], chosen.extra),
            _cut(edit, rows, length),
        )


def _cut(edit: Projections | None, rows: Tensor, length: int) -> Projections | None:
    if not isinstance(edit, TwinProjections):
        return edit
    every = (edit.twin, edit.inputs, edit.gates)
    twin, inputs, gates = (each[rows.to(each.device), :length] for each in every)
    return TwinProjections(twin, inputs, gates, edit.values)
