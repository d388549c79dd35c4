"""What a closed-form edit did to a model's projections, in figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shapes import Weight
from .constraints import Constraints
from .even_sample import Rows
from .low_rank import NOT_FINITE, LowRank


@dataclass(frozen=True)
class LayerReport:
    """Figures of one projection; norms are Frobenius'.

    Attributes:
        name: of the projection.
        change: |dW| / |W|.
        residual: how much of the asked-for change of outputs is not met (0 met, 1 nothing done).
        drift: |dW e| / |W e| over preserved encodings; None when nothing is preserved.
    """

    name: str
    change: float
    residual: float
    drift: float | None


@dataclass(frozen=True)
class EditReport:
    """Figures of a whole edit.

    Attributes:
        layers: one for each projection.
        constraints: how many there were, and how many of them asked for a change.
        rank: of the edit.
        condition: condition number of the solved system.
    """

    layers: tuple[LayerReport, ...]
    constraints: tuple[int, int]
    rank: int
    condition: float

    @classmethod
    def joined(cls, reports: Sequence[EditReport]) -> EditReport:
        """One report on several solves of one edit: the largest rank and condition number.

        Raises:
            ValueError: for no report at all.
        """
        if not reports:
            raise ValueError("expected at least one report to join, found none")
        return cls(
            tuple(layer for report in reports for layer in report.layers),
            (
                sum(report.constraints[0] for report in reports),
                sum(report.constraints[1] for report in reports),
            ),
            max(report.rank for report in reports),
            max(report.condition for report in reports),
        )

    def text(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{len(self.layers)} projections edited, rank {self.rank}",
            f"constraints: {self.constraints[0]}, of which {self.constraints[1]} ask for a change",
            f"|dW|/|W|: {_range([layer.change for layer in self.layers])}",
            f"asked for and not met: {_range([layer.residual for layer in self.layers])}",
        ]
        drifts = [layer.drift for layer in self.layers if layer.drift is not None]
        lines.append(f"drift of what is preserved: {_range(drifts) if drifts else 'not measured'}")
        lines.append(f"condition number {self.condition:.1e}")
        return "\n".join(lines)


def layer_figures(
    weight: Weight, change: LowRank, asked: Constraints, preserved: Rows | None = None
) -> Tensor:
    """Figures of one projection, for `layer_reports` to read: a tensor, so that nobody waits.

    Args:
        weight: as it was before the change.
        change: of the weight.
        asked: the constraints to look at, each asking for a change.
        preserved: encodings to measure the drift on.

    Returns:
        (7,) fp64 where the change is: 1 for a finite change or 0, then the norms of dW, of W, of
        what is not met, of what was asked for, of what moved and of what should have stayed.
    """
    inputs, targets = (rows.to(change.up) for rows in (asked.inputs, asked.targets))
    scale = asked.row_weights.sqrt().to(change.up)[:, None]
    kind = weight.detach().to(change.up)
    wanted = ((targets - inputs) @ kind.mT) * scale
    done = (inputs @ change.down.mT @ change.up.mT) * scale
    rows = change.down.new_zeros(1, kind.shape[1]) if preserved is None else preserved.to(change.up)
    measured = kind, wanted - done, wanted, rows @ change.down.mT @ change.up.mT, rows @ kind.mT
    norms = [torch.linalg.vector_norm(each).double() for each in measured]
    return torch.stack([change.is_finite().double(), change.norm_tensor(), *norms])


def layer_reports(
    names: Sequence[str], figures: Sequence[Tensor], drifts: bool
) -> tuple[LayerReport, ...]:
    """Read the figures of all projections, a device once.

    Args:
        names: of the projections.
        figures: (7,) each, as `layer_figures` gives them.
        drifts: whether a drift was measured.

    Raises:
        ValueError: naming the first projection whose change is not finite.
    """
    if not names:
        return ()
    on_one = torch.stack([each.to(figures[0].device) for each in figures])
    found: list[list[float]] = on_one.cpu().tolist()
    for name, (finite, *_) in zip(names, found, strict=True):
        if not finite:
            raise ValueError(f"{name}: {NOT_FINITE}")
    return tuple(
        LayerReport(
            name=name,
            change=change / max(whole, 1e-30),
            residual=_ratio(unmet, asked),
            drift=_ratio(moved, kept) if drifts else None,
        )
        for name, (_, change, whole, unmet, asked, moved, kept) in zip(names, found, strict=True)
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _range(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 2]:.2g} (median), {ordered[0]:.2g} to {ordered[-1]:.2g}"
