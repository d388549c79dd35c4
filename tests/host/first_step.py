"""What a model gives at the first step of a sampling, for either conditioning."""

from __future__ import annotations

from collections.abc import Callable

from comfy.model_patcher import ModelPatcher
from torch import Tensor


def seen_rows(
    model: ModelPatcher, sample: Callable[[ModelPatcher], object]
) -> tuple[Tensor, Tensor]:
    """Positive and negative rows of the model's first call while ``sample`` runs a clone of it."""
    rows: dict[int, Tensor] = {}

    def remember(apply_model, args):
        found = apply_model(args["input"], args["timestep"], **args["c"])
        halves = found.chunk(len(args["cond_or_uncond"]))
        for kind, half in zip(args["cond_or_uncond"], halves, strict=True):
            rows.setdefault(kind, half.clone())
        return found

    clone = model.clone()
    clone.set_model_unet_function_wrapper(remember)
    sample(clone)
    return rows[0], rows[1]
