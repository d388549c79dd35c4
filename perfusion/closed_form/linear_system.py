"""The symmetric systems of an edit: factored, judged, and refused in a sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shapes import Moment

# A system beyond this loses all digits but a few even in fp64.
WORST_CONDITION = 1e13
_POWER_STEPS = 60


def factor(system: Moment, ridge: float) -> Moment:
    """The Cholesky factor of a system A, in fp64.

    Args:
        system: A, lambda included.
        ridge: lambda, for the message.

    Raises:
        ValueError: when A is not finite or not positive definite.
    """
    if not bool(torch.isfinite(system).all()):
        raise ValueError(
            "the sums over the constraints are not finite: expected encodings, weights and a prior "
            "whose products fp64 can hold; use smaller weights"
        )
    lower, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        raise ValueError(_singular(ridge, "it is not positive definite"))
    return lower


def checked_condition(condition: float, ridge: float) -> float:
    """The condition number of A.

    Raises:
        ValueError: when no digit of the solution would be right.
    """
    if not condition <= WORST_CONDITION:
        raise ValueError(_singular(ridge, f"its condition number is {condition:.0e}"))
    return condition


def largest(system: Moment) -> float:
    """The largest eigenvalue of A, by power iteration within a few per cent."""
    vector = _start(system)
    for _ in range(_POWER_STEPS):
        vector = system @ (vector / vector.norm())
    return float(vector.norm())


def largest_inverse(lower: Moment) -> float:
    """The largest eigenvalue of A^-1, from A's Cholesky factor, within a few per cent."""
    vector = _start(lower)
    for _ in range(_POWER_STEPS):
        vector = torch.cholesky_solve(vector / vector.norm(), lower)
    return float(vector.norm())


def checked_prior(prior: Moment, width: int) -> Moment:
    """The prior of an edit of this width, as it was given.

    Raises:
        ValueError: for another shape, and for NaN or infinity.
    """
    if prior.shape != (width, width):
        raise ValueError(
            f"expected a prior of shape ({width}, {width}), that of the encodings, found "
            f"{tuple(prior.shape)}; measure it with the model's own text encoder"
        )
    if not bool(torch.isfinite(prior).all()):
        raise ValueError("expected a finite prior, found NaN or infinity")
    return prior


def checked_ridge(ridge: float, prior: Moment | None) -> float:
    """The ridge lambda.

    Raises:
        ValueError: for a negative or infinite one, NaN, and for 0 without a prior.
    """
    if not ridge >= 0 or ridge == float("inf"):
        raise ValueError(f"expected a ridge (lambda) of at least 0, found {ridge}")
    if ridge == 0 and prior is None:
        raise ValueError(
            "lambda = 0 leaves the edit undetermined: expected a ridge above 0, or a prior of "
            "full rank (statistics of many captions to preserve)"
        )
    return ridge


def _start(system: Tensor) -> Tensor:
    # Random: a vector with a pattern may lie across the eigenvector looked for.
    random = torch.Generator().manual_seed(0)
    return torch.randn(system.shape[0], 1, generator=random, dtype=torch.float64).to(system)


def _singular(ridge: float, reason: str) -> str:
    return (
        f"the system of the edit cannot be solved with lambda = {ridge:g} ({reason}); "
        "use a larger lambda, or a prior measured on more captions"
    )
