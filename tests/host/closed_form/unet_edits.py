"""The weights of a UNet's text projections, to see what a closed-form edit makes of them."""

from __future__ import annotations

import comfy.model_management
import torch
from comfyui_perfusion.host.models.families import cross_attentions

SOLVING = {"ridge": 0.1, "with_to_k": True, "strength": 1.0, "layers": "", "restart": False}


def weights_of(model) -> dict[str, torch.Tensor]:
    """The text projections of a MODEL as ComfyUI computes them when it loads it."""
    # A loaded clone would have its patches in the weights that all clones share.
    comfy.model_management.unload_all_models()
    found = {}
    for layer in cross_attentions(model.model):
        for part in ("to_k", "to_v"):
            key = f"diffusion_model.{layer.name}.{part}.weight"
            found[key] = model.patch_weight_to_device(key, return_weight=True).float().clone()
    return found


def difference(first, second) -> float:
    """Largest relative difference of two models' weights."""
    a, b = weights_of(first), weights_of(second)
    return max(float((a[key] - b[key]).norm() / a[key].norm()) for key in a)
