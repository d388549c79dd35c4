"""What a closed-form edit asks for: encodings, and whose old outputs they shall have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from .even_sample import Rows


@dataclass(frozen=True, eq=False)
class Constraints:
    """Encodings ``c_j`` and the encodings ``t_j`` whose old outputs they shall have.

    Attributes:
        inputs: c.
        targets: t; a row equal to its input holds that output where it is.
        weights: a, positive; 1 for all when None.
    """

    inputs: Rows
    targets: Rows
    weights: Annotated[Tensor, "n"] | None = None

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
        """All constraints of several sets, to be met together.

        Raises:
            ValueError: for no set at all.
        """
        if not parts:
            raise ValueError("expected at least one set of constraints, found none")
        return cls(
            torch.cat([part.inputs for part in parts]),
            torch.cat([part.targets for part in parts]),
            torch.cat([part.row_weights for part in parts]),
        )

    @property
    def row_weights(self) -> Annotated[Tensor, "n"]:
        """The weights a, in fp64 on the CPU."""
        assert self.weights is not None
        return self.weights

    @property
    def width(self) -> int:
        """D, the width of the encodings."""
        return self.inputs.shape[1]

    @property
    def moved(self) -> Annotated[Tensor, "n"]:
        """Bool: which constraints ask for a change."""
        return (self.inputs != self.targets).any(dim=1)

    def __len__(self) -> int:
        return self.inputs.shape[0]


def _checked_weights(weights: Tensor | None, inputs: Rows) -> Tensor:
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
