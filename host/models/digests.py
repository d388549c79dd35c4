"""Names for the weights of a model, the same in every session."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

# How many values of each weight tell one model from another.
_HASHED_VALUES = 16
# Checkpoints of most text encoders lack it, and ComfyUI then leaves it as it found the memory.
_MAY_BE_UNFILLED = "text_projection.weight"


def weights_digest(patcher: ModelPatcher, more: str = "", within: str = "") -> str:
    """16 hexadecimal digits for the weights of a patcher, the patches on it, and some text.

    Of every weight, values spread over all of it are looked at; except of the projection with
    which a text encoder was trained beside pictures, where there may be anything. `within`: only
    of weights whose names begin so.
    """
    content = hashlib.sha256(more.encode())
    parameters = dict(patcher.model.named_parameters())
    # Not the patcher's own `get_key_patches`: it looks for every key among a module's attributes,
    # where the scales of quantised weights are not.
    for key, weight in sorted(patcher.model_state_dict().items()):
        if key.endswith(_MAY_BE_UNFILLED) or not key.startswith(within):
            continue
        content.update(key.encode())
        if weight.is_meta:
            # Packs that unpack weights where they are used make up a state, to have their memory
            # counted; the packed bytes are in the model alone, and some of its keys are nowhere.
            if key not in parameters:
                continue
            weight = parameters[key].detach().as_subclass(Tensor)
        _hash_values(content, _unpatched(patcher, key, weight))
        for strength, patch, *_ in patcher.patches.get(key, ()):
            content.update(f"{strength} {type(patch).__name__}".encode())
            for value in getattr(patch, "weights", ()):
                _hash_values(content, value)
    return content.hexdigest()[:16]


def _unpatched(patcher: ModelPatcher, key: str, weight: Tensor) -> Tensor:
    """A weight as it is without patches, which are part of it while they are loaded."""
    if key in patcher.hook_backup:
        return patcher.hook_backup[key][0]
    return patcher.backup[key].weight if key in patcher.backup else weight


def _hash_values(content: Any, value: Any) -> None:
    # Quantised tensors are subclasses that cannot be sampled like plain ones.
    if type(value) not in (Tensor, torch.nn.Parameter):
        return
    content.update(str(tuple(value.shape)).encode())
    flat = value.detach().reshape(-1)
    step = max(1, flat.numel() // _HASHED_VALUES)
    content.update(flat[::step].float().cpu().contiguous().numpy().tobytes())
