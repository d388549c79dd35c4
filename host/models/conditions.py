"""What a model wants to be told besides the text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy.model_base import BaseModel
from torch import Tensor

from .families import Family


def extra_conditions(
    model: BaseModel,
    noisy: Tensor,
    device: torch.device,
    told: Mapping[str, Tensor | None],
    size: tuple[int, int],
) -> dict[str, Tensor]:
    """Keyword arguments of a BaseModel's `apply_model` for latents (B, C, h, w).

    `told` is what goes with the text, as in a conditioning; `size` the pictures' width and height
    in pixels. SDXL wants both.
    """
    conditions = model.extra_conds(
        noise=noisy,
        device=device,
        **told,
        prompt_type="positive",
        width=size[0],
        height=size[1],
    )
    return {
        name: condition.process_cond(batch_size=noisy.shape[0], device=device, area=None).cond
        for name, condition in conditions.items()
    }


def told_with(
    family: Family, encodings: Tensor, extra: Tensor | None
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """What a model is conditioned on (B, N, D), and what goes with it.

    Args:
        family: the model's.
        encodings: the prompts, of several text encoders as one row of tokens.
        extra: what else the text encoders gave: pooled outputs (B, P), or (B, N) what is known of
            the tokens where the family's network asks for that.
    """
    network = family.network
    if network.second is None:
        return encodings, {"attention_mask" if network.masked else "pooled_output": extra}
    assert extra is not None
    first, more = network.second.text_apart(encodings, extra, family.parts[0])
    return first, {**more}
