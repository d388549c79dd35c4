"""Second moment of text encodings and the duals it defines (method section 2)."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from ..shapes import Encodings, Moment, TokenMask, Vector

Positions = Literal["words", "all"]


@dataclass(frozen=True, eq=False)
class Covariance:
    """Uncentred second moment C of the encodings that condition one model.

    Attributes:
        matrix: the mean of ``e e^T`` over all tokens, fp64 on the CPU.
        tokens: how many there were.
        captions: in how many captions.
        positions: which tokens counted: "words" (words and the end token) or "all" (padding and
            the start token too).
        encoder_hash: identifies the text encoder, its layer and its concatenation.
        ridge: relative to the mean eigenvalue; only enters the solve.
        parts: widths of the encodings of several text encoders, where tokens of each fill columns
            of their own and are zero in the others'; empty for one space. Each part has a scale
            of its own, so each is solved by itself.

    Raises:
        ValueError: for a matrix that is not square, fp64, finite and of positive trace, for a
            ridge out of range, and for parts that are not those of the matrix.
    """

    matrix: Moment
    tokens: int
    captions: int
    positions: Positions
    encoder_hash: str
    ridge: float = 1e-4
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.matrix.shape)
        if len(shape) != 2 or shape[0] != shape[1] or self.matrix.dtype != torch.float64:
            raise ValueError(
                f"expected a square fp64 covariance, found {shape} {self.matrix.dtype}"
            )
        if not bool(torch.isfinite(self.matrix).all()):
            raise ValueError(
                "expected a finite covariance, found NaN or infinity; "
                "check the text encoder it was measured with"
            )
        if not float(self.matrix.trace()) > 0:
            raise ValueError("expected a covariance with a positive trace, found none")
        if not 0 <= self.ridge < 1:
            raise ValueError(f"expected a relative ridge in [0, 1), found {self.ridge}")
        if self.parts:
            self._check_parts()

    def _check_parts(self) -> None:
        if min(self.parts) < 1 or sum(self.parts) != self.width:
            raise ValueError(f"expected parts that add up to {self.width}, found {self.parts}")
        blocks = [self.matrix[columns, columns] for columns in self.columns]
        if not all(float(block.trace()) > 0 for block in blocks):
            raise ValueError(
                "expected a covariance with a positive trace in every part, found none in one; "
                "measure it with all text encoders of the model"
            )
        if not torch.equal(torch.block_diag(*blocks), self.matrix):
            raise ValueError(
                f"expected no moments between the parts {self.parts} of a covariance, found some"
            )

    @property
    def columns(self) -> tuple[slice, ...]:
        """The columns of each part; all of them where there is one."""
        widths = self.parts or (self.width,)
        ends = list(itertools.accumulate(widths))
        return tuple(slice(end - width, end) for end, width in zip(ends, widths, strict=True))

    @property
    def width(self) -> int:
        """D, the width of the encodings."""
        return self.matrix.shape[0]

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that name these statistics in a concept file."""
        summary = f"{self.tokens} {self.captions} {self.positions} {self.encoder_hash} {self.ridge}"
        summary += f" {self.parts}" if self.parts else ""
        content = hashlib.sha256(summary.encode())
        content.update(self.matrix.contiguous().numpy().tobytes())
        return content.hexdigest()[:16]

    @cached_property
    def _regularised(self) -> Tensor:
        found = self.matrix.clone()
        for columns in self.columns:
            block = found[columns, columns]
            mean_eigenvalue = block.trace() / block.shape[0]
            identity = torch.eye(block.shape[0], dtype=torch.float64)
            found[columns, columns] = block + self.ridge * mean_eigenvalue * identity
        return found

    @cached_property
    def factor(self) -> Tensor:
        """L (D, D), lower triangular: ``L L^T`` is the matrix with its ridge, which is solved.

        Raises:
            ValueError: for a matrix that is not positive definite.
        """
        factor, failed = torch.linalg.cholesky_ex(self._regularised)
        if int(failed):
            raise ValueError(
                f"the covariance of {self.tokens} tokens is not positive definite with ridge "
                f"{self.ridge:g}; use more captions or a larger ridge"
            )
        return factor

    def condition_number(self) -> float:
        """Largest over smallest eigenvalue of the matrix the solve uses (with its ridge)."""
        eigenvalues = torch.linalg.eigvalsh(self._regularised)
        return float(eigenvalues[-1] / eigenvalues[0])

    def dual(self, i: Vector) -> Vector:
        """``u = C^-1 i`` in fp64 on the CPU; the factor is computed once and kept.

        In several parts i is the mean of the concept's tokens, one of each part, and u scales each
        part to the same energy: so the similarity of each of these tokens is 1, however strong an
        encoder speaks.

        Raises:
            ValueError: when the width differs (naming both), for a matrix that is not positive
                definite, and for an i that is zero in one of the parts.
        """
        if i.shape != (self.width,):
            raise ValueError(
                f"expected an input of shape ({self.width},), the covariance's, found "
                f"{tuple(i.shape)}; measure the covariance with the model's own text encoder"
            )
        column = rearrange(i.detach().to("cpu", torch.float64), "d -> d 1")
        u = rearrange(torch.cholesky_solve(column, self.factor), "d 1 -> d")
        if not self.parts:
            return u
        shares = [column[columns, 0] @ u[columns] for columns in self.columns]
        if not all(float(share) > 0 for share in shares):
            raise ValueError(
                f"expected an input with a share in each of the parts {self.parts}, found none in "
                "one; the concept must be named in every text encoder"
            )
        return torch.cat([u[c] / share for c, share in zip(self.columns, shares, strict=True)])


class CovarianceAccumulator:
    """Streams encodings into a `Covariance`: only the (D, D) sum is ever held.

    Args:
        width: D.
        positions: which tokens count, see `Covariance`.
        encoder_hash: names the text encoder.
        parts: see `Covariance`.

    Raises:
        ValueError: for other positions.
    """

    def __init__(
        self, width: int, positions: Positions, encoder_hash: str, parts: tuple[int, ...] = ()
    ) -> None:
        if positions not in ("words", "all"):
            raise ValueError(f"expected positions 'words' or 'all', found {positions!r}")
        self._sum = torch.zeros(width, width, dtype=torch.float64)
        self._tokens = 0
        self._captions = 0
        self._positions: Positions = positions
        self._encoder_hash = encoder_hash
        self._parts = parts

    def add(self, encodings: Encodings, mask: TokenMask | None = None) -> None:
        """Add the encodings of some captions.

        Args:
            encodings: of any number of tokens.
            mask: marks the words and the end tokens; required for positions "words" and ignored
                for "all".

        Raises:
            ValueError: for shapes that do not fit and for NaN or infinity among the counted
                encodings.
        """
        width = self._sum.shape[0]
        if encodings.ndim != 3 or encodings.shape[-1] != width:
            raise ValueError(f"expected encodings (B, N, {width}), found {tuple(encodings.shape)}")
        if self._positions == "all":
            counted = rearrange(encodings, "b n d -> (b n) d")
        elif mask is None or mask.shape != encodings.shape[:2] or mask.dtype != torch.bool:
            found = "none" if mask is None else f"{tuple(mask.shape)} {mask.dtype}"
            raise ValueError(
                f"positions 'words' needs a bool mask {tuple(encodings.shape[:2])} of the words "
                f"and end tokens, found {found}"
            )
        else:
            # By index, chosen where the mask is: a mask on a GPU would make the CPU wait for it.
            chosen = mask.flatten().nonzero().flatten()
            flat = rearrange(encodings, "b n d -> (b n) d")
            counted = flat.index_select(0, chosen.to(encodings.device))
        # Not every kind of device has fp64.
        device = encodings.device if encodings.device.type == "cuda" else torch.device("cpu")
        rows = counted.detach().to(device, torch.float64)
        # Elsewhere the check would make the CPU wait at every batch; the result is checked too.
        if device.type == "cpu" and not bool(torch.isfinite(rows).all()):
            raise ValueError("expected finite text encodings, found NaN or infinity")
        self._sum = self._sum.to(device)
        self._sum.addmm_(rows.mT, rows)
        self._tokens += rows.shape[0]
        self._captions += encodings.shape[0]

    def result(self, ridge: float = 1e-4) -> Covariance:
        """The mean over all tokens added so far.

        Raises:
            ValueError: when there are none.
        """
        if self._tokens == 0:
            raise ValueError("expected at least one token to measure the covariance of, found none")
        return Covariance(
            matrix=(self._sum / self._tokens).cpu(),
            tokens=self._tokens,
            captions=self._captions,
            positions=self._positions,
            encoder_hash=self._encoder_hash,
            ridge=ridge,
            parts=self._parts,
        )
