"""The covariance C of the modules, however it was handed over, and ``u = C^-1 i``."""

from __future__ import annotations

import logging
from typing import Protocol

import torch

from ..gated.covariance import Covariance
from ..shapes import Moment, Vector

logger = logging.getLogger("perfusion")

# Rounding of a covariance measured in half precision, relative to its largest entry.
SYMMETRY_TOLERANCE = 1e-2


class Metric(Protocol):
    """What the modules need of C."""

    def dual(self, i: Vector) -> Vector:
        """``C^-1 i`` in fp64 on the CPU."""
        ...


class PlainMatrix:
    """A square matrix that is no covariance, solved as it stands.

    Raises:
        ValueError: for one without an inverse.
    """

    def __init__(self, matrix: Moment) -> None:
        *self._factors, failed = torch.linalg.lu_factor_ex(matrix)
        if int(failed):
            raise ValueError(
                "C: expected a covariance, found a matrix that is none and has no inverse; measure "
                "one with calculate_input_covariance"
            )

    def dual(self, i: Vector) -> Vector:
        """``C^-1 i``, its sign such that ``i . u`` is positive (similarities keep theirs)."""
        column = i.detach().to("cpu", torch.float64)[:, None]
        u = torch.linalg.lu_solve(*self._factors, column)[:, 0]
        return u * torch.sign(column[:, 0] @ u)


def as_metric(matrix: Moment | Covariance, width: int) -> Metric:
    """A `Covariance` of ``width`` D as it is, or a matrix (D, D) made one.

    A matrix that is not symmetric and positive definite is used as it stands, with a warning:
    similarities then measure nothing.

    Raises:
        ValueError: for another shape (naming both), for NaN, infinity or nothing but zeros, and
            for a matrix without an inverse.
    """
    plain = matrix.matrix if isinstance(matrix, Covariance) else matrix
    if plain.shape != (width, width):
        raise ValueError(
            f"C: expected a covariance ({width}, {width}) for encodings of width {width}, found "
            f"{tuple(plain.shape)}; measure it with calculate_input_covariance"
        )
    if isinstance(matrix, Covariance):
        return matrix
    exact = matrix.detach().to("cpu", torch.float64)
    if not (bool(torch.isfinite(exact).all()) and bool(exact.any())):
        raise ValueError("C: expected a finite covariance other than 0, found NaN, infinity or 0")
    asymmetry = float((exact - exact.mT).abs().max() / exact.abs().max())
    symmetric = (exact + exact.mT) / 2
    if asymmetry <= SYMMETRY_TOLERANCE and float(exact.trace()) > 0:
        covariance = Covariance(symmetric, 0, 0, "words", "unnamed")
        regularised = symmetric + covariance.ridge * symmetric.trace() / width * torch.eye(width)
        _, failed = torch.linalg.cholesky_ex(regularised)
        if not int(failed):
            return covariance
    logger.warning(
        "C: expected a symmetric positive definite covariance, found a matrix that is not "
        "(asymmetry %.2g); similarities will measure nothing, measure one with "
        "calculate_input_covariance",
        asymmetry,
    )
    return PlainMatrix(exact)
