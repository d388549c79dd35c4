"""All that a solve needs of its constraints, gathered while they pass by."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..shapes import Moment
from .constraints import Constraints
from .even_sample import EvenSample, Rows

SAMPLE = 64
"""Constraints kept at most, to see afterwards how well they are met."""
# Rows of a large part that are taken to fp64 together.
_TOGETHER = 2048


class RowProduct:
    """``sum_j l_j r_j^T`` over pairs of rows; the rows themselves while they are fewer than D."""

    def __init__(self, width: int) -> None:
        """Begin with no row.

        Args:
            width: D of both rows.
        """
        self.width = width
        self.count = 0
        self._held: list[tuple[Rows, Rows]] = []
        self._total: Moment | None = None

    @property
    def few(self) -> bool:
        """Whether there are fewer rows than the product has."""
        return self.count < self.width

    def add(self, left: Rows, right: Rows) -> None:
        """Add pairs of rows, in fp64 where they are to be computed with."""
        self.count += len(left)
        self._held.append((left, right))
        if not self.few:
            self._total, self._held = self._sum(self._total), []

    def rows(self) -> tuple[Rows, Rows]:
        """All pairs of rows; only while they are few."""
        left, right = zip(*self._held, strict=True)
        return torch.cat(left), torch.cat(right)

    def total(self) -> Moment:
        """The product, the caller's own copy."""
        return self._sum(None if self._total is None else self._total.clone())

    def _sum(self, total: Moment | None) -> Moment:
        for left, right in self._held:
            if total is None:
                total = left.new_zeros(self.width, self.width)
            total.addmm_(left.mT, right)
        assert total is not None
        return total


class GatheredConstraints:
    """Sums over constraints that come in parts; never more than D of them are held.

    Attributes:
        inputs: of all constraints, sqrt(a) c and the same again: their product is A's own part.
        changes: of those that ask for a change, sqrt(a) (t - c) and sqrt(a) c.
    """

    def __init__(self, width: int, device: torch.device | str) -> None:
        """Begin with no constraint.

        Args:
            width: D, the width of the encodings.
            device: where to compute, in fp64.
        """
        self.inputs, self.changes = RowProduct(width), RowProduct(width)
        self._device = device
        self._asking: list[Tensor] = []
        self._sample = EvenSample(SAMPLE)

    def add(self, part: Constraints) -> None:
        """Add some constraints.

        Raises:
            ValueError: for encodings of another width than those before.
        """
        if part.width != self.inputs.width:
            raise ValueError(
                f"expected constraints of one width, found {self.inputs.width} and {part.width}"
            )
        columns = part.inputs, part.targets, part.row_weights
        for start in range(0, len(part), _TOGETHER):
            inputs, targets, weights = (
                column[start : start + _TOGETHER].detach().to(self._device, torch.float64)
                for column in columns
            )
            asking = (inputs != targets).any(dim=1)
            self._asking.append(asking)
            self._sample.add(inputs[asking], targets[asking], weights[asking])
            root = weights.sqrt()[:, None]
            scaled = root * inputs
            self.inputs.add(scaled, scaled)
            self.changes.add((root * (targets - inputs))[asking], scaled[asking])

    @property
    def asking(self) -> Annotated[Tensor, "n"]:
        """Bool: which of the constraints ask for a change."""
        return torch.cat(self._asking)

    def sample(self) -> Constraints:
        """At most 64 of the constraints that ask for a change, spread evenly, fp64 on the CPU."""
        return Constraints(*self._sample.rows())
