"""Copies of a user's models that training may load, differentiate and throw away."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any, Literal

import comfy.clip_model
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor

from ..injection.injection import set_injection
from ..models.families import UnsupportedModelError, describe_model

Precision = Literal["auto", "fp32", "bf16", "fp16"]

PRECISIONS: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_PLAIN = {*PRECISIONS.values(), torch.float64}


def private_patcher(patcher: ModelPatcher) -> ModelPatcher:
    """A patcher with weights of its own and the same patches, without applied concepts.

    Call it under `torch.inference_mode(False)` and with the original unloaded: weights loaded
    inside a prompt are inference tensors, through which nothing can be differentiated; their
    copies are ordinary ones.

    Raises:
        UnsupportedModelError: when its loader cannot load the weights a second time.
    """
    if patcher.is_dynamic():
        if patcher.cached_patcher_init is None:
            raise UnsupportedModelError(
                f"{describe_model(patcher.model)} came from a loader that cannot load it again, "
                "which training needs; use one of ComfyUI's own loaders, or start ComfyUI with "
                "--disable-dynamic-vram"
            )
        private = patcher.clone(disable_dynamic=True, force_deepcopy=True)
    elif patcher.cached_patcher_init is not None and not stored_plainly(patcher.model):
        # Quantised weights are wrappers without a storage to copy; their loader reads them again.
        private = patcher.clone(force_deepcopy=True)
    else:
        private = patcher.clone(model_override=(_copied(patcher.model), ({}, {}, {}, set())))
    private.is_injected = False
    set_injection(private, None)
    private.model.requires_grad_(False)
    return private


def _copied(model: torch.nn.Module) -> torch.nn.Module:
    """A model with weights of its own, quantised ones too."""
    # Configurations answer None for every attribute they lack, which deepcopy mistakes for
    # its hooks; nothing writes to them, so they are shared.
    config = getattr(model, "model_config", None)
    known: dict[int, object] = {id(config): config}
    for weight in model.parameters():
        if not _is_plain(weight):
            own = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            known[id(weight)] = own
    return copy.deepcopy(model, known)


def private_clip(clip: CLIP) -> CLIP:
    """A CLIP with weights of its own through which gradients can flow."""
    private = clip.clone()
    private.patcher = private_patcher(clip.patcher)
    private.cond_stage_model = private.patcher.model
    for module in private.cond_stage_model.modules():
        if isinstance(module, comfy.clip_model.CLIPLayer):
            module.forward = MethodType(_layer_out_of_place, module)
    return private


def unload(patcher: ModelPatcher) -> None:
    """Unload a patcher and its clones, which restores their weights as they were loaded."""
    loaded_models = comfy.model_management.current_loaded_models
    for loaded in list(loaded_models):
        if loaded.model is not None and loaded.model.is_clone(patcher):
            loaded.model_unload()
            loaded_models.remove(loaded)


def _layer_out_of_place(
    self: Any, x: Tensor, mask: Tensor | None = None, optimized_attention: Any = None
) -> Tensor:
    # ComfyUI's own adds to x in place, and x has been saved for the backward pass by then.
    x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
    return x + self.mlp(self.layer_norm2(x))


def ordinary(tensor: Tensor) -> Tensor:
    """A copy that is no inference tensor; call it under `torch.inference_mode(False)`."""
    return tensor.detach().clone()


def training_dtype(patcher: ModelPatcher, precision: Precision = "auto") -> torch.dtype:
    """The dtype to compute in. "auto": the model's own, except fp16.

    Gradients underflow in fp16 unless the loss is scaled, so it is only taken when asked for.
    "auto" then is bf16 where the device is fast at it, and fp32 elsewhere.
    """
    if precision != "auto":
        return PRECISIONS[precision]
    dtype = patcher.model.get_dtype_inference()
    if dtype is not torch.float16:
        return dtype
    bf16 = comfy.model_management.should_use_bf16(patcher.load_device)
    return torch.bfloat16 if bf16 else torch.float32


def compute_in(patcher: ModelPatcher, dtype: torch.dtype) -> None:
    """Make a private model compute in a dtype; call it before it is loaded.

    Its weights are converted, because a weight that is cast where it is used is kept a second time
    for the backward pass. Weights stored in fewer than 16 bits or quantised stay what they are and
    are cast where they are used: that is what their owner chose them for.
    """
    model = patcher.model
    if stored_plainly(model.diffusion_model):
        model.diffusion_model.to(dtype).dtype = dtype
        model.manual_cast_dtype = None
        patcher.size = 0  # measured anew when somebody asks
    else:
        patcher.set_model_compute_dtype(dtype)


def stored_plainly(module: torch.nn.Module) -> bool:
    """Whether all weights are ordinary tensors of 16 bits or more."""
    return all(_is_plain(weight) and weight.dtype in _PLAIN for weight in module.parameters())


def _is_plain(weight: Tensor) -> bool:
    # A parameter made of a tensor of another class is of that class.
    return type(weight) in (Tensor, torch.nn.Parameter)
