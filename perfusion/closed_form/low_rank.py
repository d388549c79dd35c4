"""Changes of a weight as thin factors, added up, shortened and written as LoRA tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ..shapes import Weight

NOT_FINITE = (
    "expected a projection of finite weights, found NaN or infinity; the checkpoint or a patch on "
    "it is broken"
)


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change ``up @ down`` of one weight, as two factors of a small rank r."""

    up: Annotated[Tensor, "d r"]
    down: Annotated[Tensor, "r D"]

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                f"expected factors (d, r) and (r, D), found {tuple(self.up.shape)} and "
                f"{tuple(self.down.shape)}"
            )

    @property
    def rank(self) -> int:
        """r, the number of columns kept; the change's own rank is at most this."""
        return self.up.shape[1]

    def dense(self) -> Weight:
        """The change itself."""
        return self.up @ self.down

    def norm(self) -> float:
        """Frobenius norm of the change, without making it."""
        return float(self.norm_tensor())

    def norm_tensor(self) -> Tensor:
        """The norm as an fp64 scalar where the change is, which nobody waits for."""
        gram = (self.up.mT @ self.up).double() * (self.down @ self.down.mT).double()
        return gram.sum().clamp(min=0.0).sqrt()

    def is_finite(self) -> Tensor:
        """Whether it holds neither NaN nor infinity, as a scalar where the change is."""
        return torch.isfinite(self.up).all()

    def scaled(self, strength: float) -> LowRank:
        """The change times a number."""
        return LowRank(self.up * strength, self.down)

    @classmethod
    def total(cls, changes: Sequence[LowRank]) -> LowRank:
        """The sum of several changes of one weight, exactly.

        Raises:
            ValueError: for no change at all.
        """
        if not changes:
            raise ValueError("expected at least one change to add up, found none")
        return cls(
            torch.cat([change.up for change in changes], dim=1),
            torch.cat([change.down for change in changes], dim=0),
        )

    def truncated(self, rank: int | None = None) -> tuple[LowRank, float]:
        """The nearest change of at most this rank, and the relative error (Frobenius) it makes.

        Balanced factors: both hold the square root of the singular values, so that neither leaves
        the range of fp16.

        Args:
            rank: at least 1; None leaves out only what is numerically zero.

        Raises:
            ValueError: for a rank below 1, and for factors that hold NaN or infinity.
        """
        if rank is not None and rank < 1:
            raise ValueError(f"expected a rank of at least 1, found {rank}")
        if not bool(torch.isfinite(self.up).all() and torch.isfinite(self.down).all()):
            raise ValueError(
                "expected a change of finite numbers, found NaN or infinity; edit the model again"
            )
        basis, triangle = torch.linalg.qr(self.down.double().mT)  # (D, m), (m, r)
        outer = self.up.double() @ triangle.mT
        # The singular values of the change, through the small Gram matrix; ascending.
        energies, axes = torch.linalg.eigh(outer.mT @ outer)
        energies = energies.clamp(min=0)
        total = float(energies.sum())
        kept = energies > 1e-15 * total
        if rank is not None:
            kept[: max(0, len(kept) - rank)] = False
        roots = energies[kept] ** 0.25
        up = (outer @ axes[:, kept]) / roots
        down = ((basis @ axes[:, kept]) * roots).mT
        error = (float(energies[~kept].sum()) / total) ** 0.5 if total else 0.0
        return LowRank(up.to(self.up), down.to(self.down)), error


def lora_tensors(
    changes: Mapping[str, LowRank], dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """LoRA content that every loader reads: `<name>.lora_up.weight`, `.lora_down.weight`, `.alpha`.

    Args:
        changes: a layer's name in the wanted naming scheme -> its change.
        dtype: of the factors; alpha is fp32.

    Returns:
        The tensors; alpha equals the rank, so that strength 1 is the change as it is.

    Raises:
        ValueError: for values the dtype cannot hold, and when no layer is changed.
    """
    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        if change.rank == 0:
            continue
        up, down = (t.detach().to("cpu", dtype).contiguous() for t in (change.up, change.down))
        if not bool(torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise ValueError(
                f"the change of {name} has values that {dtype} cannot hold; save in float32"
            )
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.lora_down.weight"] = down
        # Half precision cannot hold every rank: 257 would be read as 256 or 258.
        tensors[f"{name}.alpha"] = torch.tensor(float(change.rank), dtype=torch.float32)
    if not tensors:
        raise ValueError("the edit changes no layer: there is nothing to save")
    return tensors
