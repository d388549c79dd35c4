"""What a model wants to be told besides the text."""

from __future__ import annotations

import torch
from comfy.model_base import BaseModel
from torch import Tensor

from .families import network_of


def extra_conditions(
    model: BaseModel,
    noisy: Tensor,
    device: torch.device,
    pooled: Tensor | None,
    size: tuple[int, int],
) -> dict[str, Tensor]:
    """Keyword arguments of a BaseModel's `apply_model` for latents (B, C, h, w).

    `pooled` (B, P) or None is the pooled text, or (B, N) says which tokens are words where that
    is asked for; `size` the pictures' width and height in pixels. SDXL wants both.
    """
    masked = network_of(model).masked
    conditions = model.extra_conds(
        noise=noisy,
        device=device,
        pooled_output=None if masked else pooled,
        attention_mask=pooled if masked else None,
        prompt_type="positive",
        width=size[0],
        height=size[1],
    )
    return {
        name: condition.process_cond(batch_size=noisy.shape[0], device=device, area=None).cond
        for name, condition in conditions.items()
    }
