"""The one solver behind TIME, MACE's refinement and UCE (method section 5).

Wanted is the change ``dW`` of a projection ``W`` (d, D) that moves the outputs of some encodings
``c_j`` to ``v_j`` and little else:

    minimise  sum_j a_j |(W + dW) c_j - v_j|^2 + lambda |dW|^2 + tr(dW P dW^T)

    dW = sum_j (v_j - W c_j) r_j^T    with  r_j = a_j A^-1 c_j,
    A  = sum_j a_j c_j c_j^T + lambda I + P

``P`` is the prior: a second moment of encodings to preserve, times its weight. In every published
editor the wanted outputs are those of other encodings, ``v_j = W t_j``; then

    dW = W M   with  M = sum_j (t_j - c_j) r_j^T = B A^-1,   B = sum_j a_j (t_j - c_j) c_j^T

``A``, ``B`` and ``M`` depend on the text alone, so they are computed once for all layers, for K and
for V, and the whole edit is one D x D matrix of low rank, whatever model it will be applied to.
A and B are sums: constraints may come in parts, and however many there are, no more than D of them
are ever held. Everything up to M is fp64: A is ill-conditioned and M is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Annotated

import torch
from einops import einsum
from torch import Tensor

from ..shapes import Moment, Weight
from .constraints import Constraints
from .even_sample import Rows
from .gathered import GatheredConstraints
from .linear_system import (
    checked_condition,
    checked_prior,
    checked_ridge,
    factor,
    largest,
    largest_inverse,
)
from .low_rank import NOT_FINITE, LowRank

# What is left out of the shared factors because no fp32 weight could hold it, relative to |M|.
_NEGLIGIBLE = 1e-7


@dataclass(frozen=True, eq=False)
class SolvedEdit:
    """A solved edit ``dW = W left right``, the same for every projection.

    Attributes:
        left: (D, r) fp64.
        right: (r, D) fp64 with orthonormal rows, so that ``|dW| = |W left|``.
        condition: condition number of A (estimated by power iteration, within a few per cent).
        count: how many constraints there were.
        moved: how many of them ask for a change.
        sample: at most 64 of those that do, spread evenly, fp64 on the CPU.
    """

    left: Annotated[Tensor, "D r"]
    right: Annotated[Tensor, "r D"]
    condition: float
    count: int
    moved: int
    sample: Constraints

    @property
    def rank(self) -> int:
        """r, at most the number of constraints that ask for a change."""
        return self.right.shape[0]

    @property
    def width(self) -> int:
        """D, the width of the encodings."""
        return self.right.shape[1]

    def factors(self, weight: Weight) -> LowRank:
        """The change of one projection.

        Computed where the weight is, in fp32 (fp64 for an fp64 weight); the weight stays as it is.

        Raises:
            ValueError: for a weight of another width and for one that holds NaN or infinity.
        """
        change = self.factors_unread(weight)
        if not bool(change.is_finite()):
            raise ValueError(NOT_FINITE)
        return change

    def factors_unread(self, weight: Weight) -> LowRank:
        """`factors` without a look at the numbers, for which a device would have to be waited for.

        Raises:
            ValueError: for a weight of another width.
        """
        if weight.ndim != 2 or weight.shape[1] != self.width:
            raise ValueError(
                f"expected a projection (d, {self.width}), found {tuple(weight.shape)}; "
                "use the text encoder that belongs to the model"
            )
        kind = torch.promote_types(weight.dtype, torch.float32)
        up = weight.detach().to(kind) @ self.left.to(weight.device, kind)
        return LowRank(up, self.right.to(weight.device, kind))


def solve(
    constraints: Constraints | Iterable[Constraints],
    ridge: float,
    prior: Moment | None = None,
    device: torch.device | str = "cpu",
) -> SolvedEdit:
    """The edit that meets the constraints, for all projections that read these encodings.

    Args:
        constraints: all of them, or parts of them one after the other; a part is not looked at
            again, so that parts may be made as they are asked for.
        ridge: lambda, pulls towards the old weights; 0 only with a prior of full rank.
        prior: P, the second moment of encodings to preserve times its weight.
        device: where to compute, in fp64; the result is there too.

    Raises:
        ValueError: for no constraint, for none that asks for a change, for a ridge that leaves A
            singular, and for shapes that do not fit.
    """
    ridge = checked_ridge(ridge, prior)
    parts = iter([constraints] if isinstance(constraints, Constraints) else constraints)
    first = next(parts, None)
    if first is None:
        raise ValueError("expected at least one set of constraints, found none")
    gathered = GatheredConstraints(first.width, device)
    for part in chain([first], parts):
        gathered.add(part)
    count, moved = gathered.inputs.count, gathered.changes.count
    if not count:
        raise ValueError("expected at least one constraint, found none")
    if not moved:
        raise ValueError(
            f"none of the {count} constraints asks for a change, every encoding is its own target: "
            "nothing would be edited; ask for words that differ to the text encoder"
        )
    if prior is None and gathered.inputs.few:
        differences, rows, condition = _in_few_unknowns(gathered, ridge)
    else:
        differences, rows, condition = _in_all_unknowns(gathered, ridge, prior)
    left, right = _thin(differences, rows, moved)
    if not len(right):
        raise ValueError(
            f"nothing is left of the edit with lambda = {ridge:g}: it is too small a change for "
            "fp64; use a smaller lambda"
        )
    return SolvedEdit(left, right, condition, count, moved, gathered.sample())


def _in_few_unknowns(
    gathered: GatheredConstraints, ridge: float
) -> tuple[Rows | None, Rows, float]:
    # (X^T X + l)^-1 X^T = X^T (X X^T + l)^-1; the D - n other eigenvalues of A are l.
    scaled, _ = gathered.inputs.rows()
    gram = scaled @ scaled.mT
    gram.diagonal().add_(ridge)
    solved = torch.cholesky_solve(scaled, factor(gram, ridge))
    condition = checked_condition(largest(gram) / ridge, ridge)
    differences, _ = gathered.changes.rows()
    return differences, solved[gathered.asking], condition


def _in_all_unknowns(
    gathered: GatheredConstraints, ridge: float, prior: Moment | None
) -> tuple[Rows | None, Rows, float]:
    system = gathered.inputs.total()
    system.diagonal().add_(ridge)
    if prior is not None:
        system += checked_prior(prior, gathered.inputs.width).to(system)
    lower = factor(system, ridge)
    condition = checked_condition(largest(system) * largest_inverse(lower), ridge)
    if gathered.changes.few:
        differences, scaled = gathered.changes.rows()
        return differences, torch.cholesky_solve(scaled.mT, lower).mT, condition
    return None, torch.cholesky_solve(gathered.changes.total().mT, lower).mT, condition


def _thin(differences: Rows | None, rows: Rows, moved: int) -> tuple[Tensor, Tensor]:
    # sum_j differences_j rows_j^T (just the rows' matrix without differences) = left right, right
    # orthonormal, of the rank that fp32 can tell and that so many constraints can have.
    if differences is None:
        basis, left = None, rows
    else:
        basis, triangle = torch.linalg.qr(rows.mT)  # (D, m), (m, m)
        left = einsum(differences, triangle, "k a, m k -> a m")
    energies, axes = torch.linalg.eigh(left.mT @ left)
    # Eigenvalues ascend: leave out the first ones whose sum is negligible.
    energies = energies.clamp(min=0)
    kept = energies.cumsum(0) > _NEGLIGIBLE**2 * energies.sum()
    kept[: max(0, len(kept) - moved)] = False
    axes = axes[:, kept]
    right = axes if basis is None else basis @ axes
    return left @ axes, right.mT.contiguous()
