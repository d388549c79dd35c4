"""What a model does to each encoding by itself before its projections read it.

Weights are those of the MODEL with its patches, in fp32; nothing of the model is loaded or changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.nn import functional

from ...perfusion.closed_form.even_sample import Rows
from ..models.families import UnsupportedModelError, describe_model
from .stored_weights import PREFIX, weights_of


def norm_at(model: ModelPatcher, path: str) -> Callable[[Rows], Rows]:
    """The RMS norm at a path of the network, as a function of rows on the CPU."""
    module: Any = model.model.diffusion_model.get_submodule(path)
    ((_, weight),) = weights_of(model, [f"{PREFIX}{path}.weight"])
    scale = weight.cpu()

    def normed(rows: Rows) -> Rows:
        _check_width(model, rows, len(scale))
        return functional.rms_norm(rows, (len(scale),), scale, module.eps)

    return normed


def network_at(model: ModelPatcher, path: str) -> Callable[[Rows], Rows]:
    """The small network at a path, as a function of rows on the CPU; computed where models run.

    Raises:
        UnsupportedModelError: for weights in a form that only another pack can read.
    """
    module: nn.Module = model.model.diffusion_model.get_submodule(path)
    inside: list[tuple[str, Any]] = list(module.named_modules())
    plain: dict[int, Any] = {}
    widths = []
    for name, child in inside:
        if hasattr(child, "in_features"):
            plain[id(child)] = _plain(model, ".".join(filter(None, (path, name))), child)
            widths.append(int(child.in_features))
    network = copy.deepcopy(module, plain)
    device = comfy.model_management.get_torch_device()

    def passed(rows: Rows) -> Rows:
        _check_width(model, rows, widths[0])
        with torch.no_grad():
            return network(rows.to(device)).cpu()

    return passed


class _Plain(nn.Module):
    """A linear map whose numbers are what they mean, whatever form they are stored in."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias

    def forward(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self._weight, self._bias)


def _plain(model: ModelPatcher, path: str, module: Any) -> _Plain:
    names = ["weight"] if getattr(module, "bias", None) is None else ["weight", "bias"]
    values = [value for _, value in weights_of(model, (f"{PREFIX}{path}.{n}" for n in names))]
    return _Plain(values[0], values[1] if len(values) > 1 else None)


def _check_width(model: ModelPatcher, rows: Rows, width: int) -> None:
    if rows.shape[-1] != width:
        raise UnsupportedModelError(
            f"{describe_model(model.model)} reads encodings {width} wide, the text encoder gives "
            f"{rows.shape[-1]}; connect the CLIP loaded together with it"
        )
