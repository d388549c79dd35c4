"""The one solver behind TIME, MACE's refinement and UCE (method section 5).

Wanted is the change ``dW`` of a projection ``W`` (d, D) that moves the outputs of some encodings
``c_j`` to ``v_j`` and little else:

    minimise  sum_j a_j |(W + dW) c_j - v_j|^2 + lambda |dW|^2 + tr(dW P dW^T)

    dW = sum_j (v_j - W c_j) r_j^T    with  r_j = a_j A^-1 c_j,
    A  = sum_j a_j c_j c_j^T + lambda I + P

``P`` is the prior: a second moment of encodings to preserve, times its weight. ``A`` and the
rows ``r_j`` depend on the text alone, so they are computed once for all layers, for K and for V. In
every published editor the wanted outputs are those of other encodings, ``v_j = W t_j``; then

    dW = W M   with  M = sum_j (t_j - c_j) r_j^T

and the whole edit is one D x D matrix of low rank, whatever model it will be applied to.
Everything up to M is fp64: A is ill-conditioned and M is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor

from .low_rank import LowRank

# What is left out of the shared factors because no fp32 weight could hold it, relative to |M|.
_NEGLIGIBLE = 1e-7
# A beyond this loses all digits but a few even in fp64.
_WORST_CONDITION = 1e13
_POWER_STEPS = 60


@dataclass(frozen=True, eq=False)
class Constraints:
    """Encodings ``c_j`` and the encodings ``t_j`` whose old outputs they shall have.

    Attributes:
        inputs: c, (n, D).
        targets: t, (n, D); a row equal to its input holds that output where it is.
        weights: a, (n,), positive; 1 for all when None.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.inputs.ndim != 2 or self.inputs.shape != self.targets.shape:
            raise ValueError(
                "expected inputs and targets of one shape (n, D), found "
                f"{tuple(self.inputs.shape)} and {tuple(self.targets.shape)}"
            )
        for name in ("inputs", "targets"):
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise ValueError(
                    f"expected finite encodings as {name}, found NaN or infinity; check the text "
                    "encoder and its precision"
                )
        object.__setattr__(self, "weights", _checked_weights(self.weights, self.inputs))

    @classmethod
    def join(cls, parts: Sequence[Constraints]) -> Constraints:
        """All constraints of several sets, to be met together. Raises ValueError for none."""
        if not parts:
            raise ValueError("expected at least one set of constraints, found none")
        return cls(
            torch.cat([part.inputs for part in parts]),
            torch.cat([part.targets for part in parts]),
            torch.cat([part.row_weights for part in parts]),
        )

    @property
    def row_weights(self) -> Tensor:
        """a, (n,)."""
        assert self.weights is not None
        return self.weights

    @property
    def width(self) -> int:
        """D, the width of the encodings."""
        return self.inputs.shape[1]

    @property
    def moved(self) -> Tensor:
        """(n,) bool: the constraints that ask for a change."""
        return (self.inputs != self.targets).any(dim=1)

    def __len__(self) -> int:
        return self.inputs.shape[0]


@dataclass(frozen=True, eq=False)
class SolvedEdit:
    """A solved edit ``dW = W left right``, the same for every projection.

    Attributes:
        left: (D, r) fp64.
        right: (r, D) fp64 with orthonormal rows, so that ``|dW| = |W left|``.
        constraints: what was asked for.
        condition: condition number of A (estimated by power iteration, within a few per cent).
    """

    left: Tensor
    right: Tensor
    constraints: Constraints
    condition: float

    @property
    def rank(self) -> int:
        """r, at most the number of constraints that ask for a change."""
        return self.right.shape[0]

    def factors(self, weight: Tensor) -> LowRank:
        """The change of one projection ``weight`` (d, D): up (d, r), down (r, D).

        Computed where the weight is, in fp32 (fp64 for an fp64 weight); the weight stays as it is.
        Raises ValueError for a weight of another width and for one that holds NaN or infinity.
        """
        if weight.ndim != 2 or weight.shape[1] != self.right.shape[1]:
            raise ValueError(
                f"expected a projection (d, {self.right.shape[1]}), found {tuple(weight.shape)}; "
                "use the text encoder that belongs to the model"
            )
        kind = torch.promote_types(weight.dtype, torch.float32)
        up = weight.detach().to(kind) @ self.left.to(weight.device, kind)
        # Cheaper than to look at the weight itself, unless nothing is edited at all.
        if not bool(torch.isfinite(up if self.rank else weight).all()):
            raise ValueError(
                "expected a projection of finite weights, found NaN or infinity; "
                "the checkpoint or a patch on it is broken"
            )
        return LowRank(up, self.right.to(weight.device, kind))


def solve(
    constraints: Constraints,
    ridge: float,
    prior: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> SolvedEdit:
    """The edit that meets the constraints, for all projections that read these encodings.

    Args:
        constraints: n of them, of width D.
        ridge: lambda, pulls towards the old weights; 0 only with a prior of full rank.
        prior: P, (D, D), the second moment of encodings to preserve times its weight.
        device: where to compute, in fp64; the result is there too.

    Raises:
        ValueError: for a ridge that leaves A singular, and for shapes that do not fit.
    """
    inputs = constraints.inputs.detach().to(device, torch.float64)
    targets = constraints.targets.detach().to(device, torch.float64)
    weights = constraints.row_weights.to(device)
    rows, condition = constraint_rows(inputs, weights, ridge, prior)
    moved = constraints.moved.to(device)
    left, right = _thin((targets - inputs)[moved], rows[moved])
    return SolvedEdit(left, right, constraints, condition)


def constraint_rows(
    inputs: Tensor, weights: Tensor, ridge: float, prior: Tensor | None = None
) -> tuple[Tensor, float]:
    """Rows ``r_j = a_j A^-1 c_j`` (n, D) in fp64, and the condition number of A.

    For targets that are no encodings: ``dW = residuals @ rows`` with residuals ``v - W c`` (d, n).
    Without a prior and with n < D the system solved is n x n, else D x D.
    """
    if inputs.ndim != 2 or not len(inputs) or weights.shape != inputs.shape[:1]:
        raise ValueError(
            f"expected at least one input (n, D) and weights (n,), found {tuple(inputs.shape)} "
            f"and {tuple(weights.shape)}"
        )
    if not ridge >= 0 or ridge == float("inf"):
        raise ValueError(f"expected a ridge (lambda) of at least 0, found {ridge}")
    if ridge == 0 and prior is None:
        raise ValueError(
            "lambda = 0 leaves the edit undetermined: expected a ridge above 0, or a prior of "
            "full rank (statistics of many captions to preserve)"
        )
    scaled = inputs.double() * rearrange(weights.double().sqrt(), "n -> n 1")
    count, width = scaled.shape
    if prior is None and count < width:
        # (X^T X + l)^-1 X^T = X^T (X X^T + l)^-1; the D - n other eigenvalues of A are l.
        gram = scaled @ scaled.mT + ridge * torch.eye(count).to(scaled)
        factor = _factor(gram, ridge)
        solved = torch.cholesky_solve(scaled, factor)
        condition = _largest(gram) / ridge
    else:
        system = scaled.mT @ scaled + ridge * torch.eye(width).to(scaled)
        if prior is not None:
            system = system + _checked_prior(prior, width).to(scaled)
        factor = _factor(system, ridge)
        solved = torch.cholesky_solve(scaled.mT, factor).mT
        condition = _largest(system) * _largest_inverse(factor)
    if condition > _WORST_CONDITION:
        raise ValueError(_singular(ridge, f"its condition number is {condition:.0e}"))
    return solved * rearrange(weights.double().sqrt(), "n -> n 1"), condition


def _thin(changes: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    # sum_j changes_j rows_j^T = left right, right orthonormal, of the rank that fp32 can tell.
    basis, triangle = torch.linalg.qr(rows.mT)  # (D, m), (m, k) with m = min(k, D)
    left = einsum(changes, triangle, "k a, m k -> a m")
    energies, axes = torch.linalg.eigh(left.mT @ left)
    # Eigenvalues ascend: leave out the first ones whose sum is negligible.
    kept = energies.clamp(min=0).cumsum(0) > _NEGLIGIBLE**2 * energies.clamp(min=0).sum()
    axes = axes[:, kept]
    return left @ axes, (basis @ axes).mT.contiguous()


def _factor(system: Tensor, ridge: float) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        raise ValueError(_singular(ridge, "it is not positive definite"))
    return factor


def _singular(ridge: float, reason: str) -> str:
    return (
        f"the system of the edit cannot be solved with lambda = {ridge:g} ({reason}); "
        "use a larger lambda, or a prior measured on more captions"
    )


def _largest(system: Tensor) -> float:
    vector = torch.ones(system.shape[0], 1).to(system)
    for _ in range(_POWER_STEPS):
        vector = system @ (vector / vector.norm())
    return float(vector.norm())


def _largest_inverse(factor: Tensor) -> float:
    # A random start: the constant vector may lie across the smallest eigenvector.
    start = torch.randn(factor.shape[0], 1, generator=torch.Generator().manual_seed(0))
    vector = start.to(factor)
    for _ in range(_POWER_STEPS):
        vector = torch.cholesky_solve(vector / vector.norm(), factor)
    return float(vector.norm())


def _checked_weights(weights: Tensor | None, inputs: Tensor) -> Tensor:
    if weights is None:
        return torch.ones(len(inputs), dtype=torch.float64)
    found = weights.detach().to("cpu", torch.float64)
    good = found.shape == inputs.shape[:1] and bool(((found > 0) & torch.isfinite(found)).all())
    if not good:
        raise ValueError(
            f"expected {len(inputs)} positive constraint weights, found "
            f"{tuple(found.shape)} from {float(found.min()) if found.numel() else None}"
        )
    return found


def _checked_prior(prior: Tensor, width: int) -> Tensor:
    if prior.shape != (width, width):
        raise ValueError(
            f"expected a prior of shape ({width}, {width}), that of the encodings, found "
            f"{tuple(prior.shape)}; measure it with the model's own text encoder"
        )
    if not bool(torch.isfinite(prior).all()):
        raise ValueError("expected a finite prior, found NaN or infinity")
    return prior
