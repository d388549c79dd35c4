"""The Muon optimiser (Keller Jordan, 2024): momentum, orthogonalised, for weight matrices.

It learns clearly faster per picture than AdamW alone, which still serves vectors and embeddings.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearest half-orthogonal matrices of (n, rows, columns), rows <= columns, in five steps.

    Singular values come out between about 0.7 and 1.2, which is all the optimiser needs.
    """
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon over parameters of two or more axes; a convolution counts as (out, in * kernel)."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, bool, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(p.grad)
                g = (p.grad + group["momentum"] * state["momentum"]).flatten(1)
                tall = g.shape[0] > g.shape[1]
                g = g.T if tall else g
                by_shape[(g.shape[0], g.shape[1])].append((p, tall, g))
            for members in by_shape.values():
                updates = orthogonalise(torch.stack([g for _, _, g in members]))
                for (p, tall, _), update in zip(members, updates, strict=True):
                    scale = math.sqrt(max(1.0, p.shape[0] / p[0].numel()))
                    p.add_(
                        (update.T if tall else update).reshape(p.shape), alpha=-group["lr"] * scale
                    )


def split_parameters(
    named: Iterable[tuple[str, Tensor]], keep_out: tuple[str, ...] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """(matrices for Muon, the rest for AdamW); names starting with ``keep_out`` go to the rest."""
    matrices, rest = [], []
    for name, p in named:
        if not p.requires_grad:
            continue
        big = p.dim() >= 2 and min(p.shape[0], p[0].numel()) >= 32
        (matrices if big and not name.startswith(keep_out or ("\0",)) else rest).append(p)
    return matrices, rest
