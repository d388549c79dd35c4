"""Weights of a MODEL as numbers, in whatever form they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import comfy.lora
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...perfusion.shapes import Weight
from ..models.unsupported import UnsupportedModelError, describe_model

PREFIX = "diffusion_model."


def weights_of(model: ModelPatcher, keys: Iterable[str]) -> Iterator[tuple[str, Weight]]:
    """Key and weight, one after the other, with all patches a MODEL carries.

    As ComfyUI itself computes them when it loads a model, in fp32; nothing is loaded or changed.

    Raises:
        UnsupportedModelError: for weights in a form that only another pack can read.
    """
    return ((key, _weight(model, key)) for key in keys)


def _weight(model: ModelPatcher, key: str) -> Weight:
    module = model.model.get_submodule(key.rpartition(".")[0])
    weight = getattr(module, "weight", None)
    if not _readable(weight):
        raise UnsupportedModelError(
            f"{describe_model(model.model)} holds {key!r} as "
            f"{type(module if weight is None else weight).__name__}, which only the pack that "
            "loaded it can read; edit the model as it was before that and use Save Edit as LoRA: "
            "where that pack takes LoRA, the file works here, too"
        )
    # Not the patcher's own `get_key_patches`: it looks for every key among a module's attributes,
    # where the scales of quantised weights are not.
    stored, _, convert = get_key_weight(model.model, key)
    if key in model.backup:
        stored = model.backup[key].weight
    if key in model.hook_backup:
        stored = model.hook_backup[key][0]
    device = comfy.model_management.get_torch_device()
    cast = comfy.model_management.cast_to_device(stored, device, torch.float32, copy=True)
    plain = cast if convert is None else convert(cast, inplace=True)
    return comfy.lora.calculate_weight(model.patches.get(key, []), plain, key)


def _readable(weight: Tensor | None) -> bool:
    if weight is None or isinstance(weight, QuantizedTensor):
        return weight is not None
    # A class of another pack's may hold anything; torch's own hold what they say.
    own = type(weight).__module__.split(".")[0] == "torch"
    return own and weight.is_floating_point()
