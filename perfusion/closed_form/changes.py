"""From a solved edit to the changes of a model's projections, with their figures."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..shapes import Weight
from .low_rank import LowRank
from .preserve import Preserved
from .report import EditReport, layer_figures, layer_reports
from .solver import SolvedEdit


def changes_of(
    weights: Iterable[tuple[str, Weight]], edit: SolvedEdit, preserved: Preserved | None = None
) -> tuple[dict[str, LowRank], EditReport]:
    """An edit's changes of these projections, and what they do.

    Args:
        weights: name and weight of each projection, one after the other; a weight is not looked at
            again, so that weights may be made as they are asked for.
        edit: the solved edit.
        preserved: what to measure the drift on.

    Returns:
        Name -> change, on the CPU (`down` is one tensor for all), and the report.

    Raises:
        ValueError: naming a projection of another width, or one that is not finite.
    """
    changes: dict[str, LowRank] = {}
    figures: list[Tensor] = []
    shared: dict[object, Tensor] = {}
    sample = preserved.sample if preserved else None
    drifts = sample is not None and len(sample) > 0
    for name, weight in weights:
        try:
            change = edit.factors_unread(weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        figures.append(layer_figures(weight, change, edit.sample, sample if drifts else None))
        if change.down.dtype not in shared:
            shared[change.down.dtype] = change.down.cpu()
        changes[name] = LowRank(change.up.cpu(), shared[change.down.dtype])
    layers = layer_reports(list(changes), figures, drifts)
    count = edit.count, edit.moved
    return changes, EditReport(layers, count, edit.rank, edit.condition)
