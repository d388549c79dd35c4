"""What the losses of a run say: smoothed for each band of timesteps, as numbers and as CSV.

The loss of one step mostly tells which timesteps were drawn: a picture with much noise is hard to
guess at any stage of training. Within a band of timesteps losses can be compared.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass

import torch
from torch import Tensor

BANDS = 4
_DECAY = 0.95


@dataclass(frozen=True, eq=False)
class LossRecord:
    """Losses and timesteps (in [0, 1)) of every row of every step, both (steps, B)."""

    losses: Tensor
    timesteps: Tensor

    def per_step(self) -> tuple[float, ...]:
        """The loss of each step: the mean of its rows."""
        return tuple(self.losses.double().mean(1).float().tolist())

    def smoothed(self) -> list[BandMeans]:
        """What `BandSmoother` showed after each step."""
        smoother = BandSmoother()
        return [smoother.add(*row) for row in zip(self.losses, self.timesteps, strict=True)]

    def ends(self) -> list[tuple[float, float]]:
        """Each band's mean loss in the first and in the last quarter of the steps.

        Bands are least noise first; those that were not drawn in both quarters are NaN.
        """
        part = max(1, len(self.losses) // 4)
        first, last = (self._means(rows) for rows in (slice(None, part), slice(-part, None)))
        return [
            (math.nan, math.nan) if math.isnan(before + after) else (before, after)
            for before, after in zip(first, last, strict=True)
        ]

    def _means(self, steps: slice) -> list[float]:
        """The mean loss of each band over some of the steps, NaN for one that was not drawn."""
        losses, bands = self.losses[steps].double(), _bands(self.timesteps[steps])
        return [float(losses[bands == band].mean()) for band in range(BANDS)]

    def csv(self) -> str:
        """A line a step: number, loss, smoothed loss, each band's (empty before its first row)."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        edges = [f"{100 * band // BANDS}-{100 * (band + 1) // BANDS}%" for band in range(BANDS)]
        writer.writerow(["step", "loss", "smoothed", *(f"timesteps {edge}" for edge in edges)])
        for at, (loss, means) in enumerate(zip(self.per_step(), self.smoothed(), strict=True)):
            bands = ["" if math.isnan(mean) else f"{mean:.6g}" for mean in means.bands]
            writer.writerow([at + 1, f"{loss:.6g}", f"{means.mean:.6g}", *bands])
        return text.getvalue()


@dataclass(frozen=True)
class BandMeans:
    """Smoothed loss of each band of timesteps, least noise first; NaN before its first row."""

    bands: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the bands that have been seen: does not jump with the timesteps drawn."""
        known = [band for band in self.bands if not math.isnan(band)]
        return sum(known) / len(known)


def _bands(timesteps: Tensor) -> Tensor:
    return (timesteps * BANDS).long().clamp(0, BANDS - 1)


class BandSmoother:
    """A running mean of the losses of each band, the last 20 steps or so counting most."""

    def __init__(self) -> None:
        self._sums = torch.zeros(BANDS, dtype=torch.float64)
        self._weights = torch.zeros(BANDS, dtype=torch.float64)

    def add(self, losses: Tensor, timesteps: Tensor) -> BandMeans:
        """Take in the rows (B,) of a step; the means after it."""
        band = _bands(timesteps)
        present = torch.bincount(band, minlength=BANDS).double()
        found = torch.zeros(BANDS, dtype=torch.float64).index_add(0, band, losses.double())
        seen = present > 0
        step = torch.where(seen, found / present.clamp(min=1), 0.0)
        self._sums = torch.where(seen, _DECAY * self._sums + (1 - _DECAY) * step, self._sums)
        self._weights = torch.where(seen, _DECAY * self._weights + 1 - _DECAY, self._weights)
        return BandMeans(tuple((self._sums / self._weights).tolist()))
