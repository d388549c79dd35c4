"""Closed-form edits on a ComfyUI model: ordinary weight patches that clones and LoRA live with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_management
import torch
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ...perfusion.closed_form.low_rank import LowRank
from ...perfusion.closed_form.preserve import Preserved
from ...perfusion.closed_form.report import EditReport, measure_layer
from ...perfusion.closed_form.solver import Constraints, solve
from ..models.families import check_clip, cross_attentions, family_of

KEY = "perfusion_edits"
_PREFIX = "diffusion_model."


@dataclass(frozen=True)
class EditSettings:
    """How to solve an edit and where to put it.

    Attributes:
        ridge: lambda.
        strength: of the patches; the edit itself is solved for strength 1.
        with_to_k: edit keys besides values.
        layers: parts of layer names separated by commas; empty for all layers.
        restart: drop the edits that the model carries already.
    """

    ridge: float
    strength: float = 1.0
    with_to_k: bool = True
    layers: str = ""
    restart: bool = False


@dataclass(frozen=True, eq=False)
class AppliedEdit:
    """One edit that a model carries.

    Attributes:
        label: what was edited, for people.
        strength: of its patches.
        adapters: weight key -> the patch.
    """

    label: str
    strength: float
    adapters: Mapping[str, LoRAAdapter]

    def changes(self) -> dict[str, LowRank]:
        """Weight key -> the change at this edit's strength."""
        return {
            key: LowRank(adapter.weights[0], adapter.weights[1]).scaled(self.strength)
            for key, adapter in self.adapters.items()
        }


def check_pair(model: Any, clip: Any) -> None:
    """Make sure a MODEL can be edited with this CLIP.

    Raises:
        UnsupportedModelError: for other models, and for the CLIP of another family.
    """
    check_clip(clip, family_of(model.model))


def applied_edits(model: Any) -> tuple[AppliedEdit, ...]:
    """The edits a MODEL carries, in the order in which they were made."""
    return model.get_attachment(KEY) or ()


def apply_edit(
    model: Any,
    constraints: Constraints,
    settings: EditSettings,
    label: str,
    preserved: Preserved | None = None,
) -> tuple[Any, EditReport]:
    """A clone of a MODEL with one more edit, and what the edit does.

    The edit is solved for the weights as the MODEL brings them, LoRA and earlier edits included.
    Strength 0 leaves every weight as it is.

    Raises:
        ValueError: when no layer is chosen, for widths that differ, and for weights with NaN.
    """
    family = family_of(model.model)
    if constraints.width != family.width:
        raise ValueError(
            f"the encodings are {constraints.width} wide, {family.label} reads {family.width} wide "
            "ones; connect the CLIP that was loaded together with the model"
        )
    keys = chosen_keys(model, settings.layers, settings.with_to_k)
    edit = solve(constraints, settings.ridge, preserved.prior if preserved else None)
    patched = without_edits(model) if settings.restart else model.clone()
    sample = preserved.sample if preserved else None
    adapters, layers = {}, []
    # Shared by all layers, as it is the same for all of them.
    down = edit.right.float()
    for key, weight in _weights(patched, keys):
        comfy.model_management.throw_exception_if_processing_interrupted()
        name = key.removeprefix(_PREFIX).removesuffix(".weight")
        try:
            change = edit.factors(weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        layers.append(measure_layer(name, weight, change, edit, sample))
        adapters[key] = LoRAAdapter(set(), (change.up.cpu(), down, None, None, None, None))
    if settings.strength != 0:
        patched.add_patches(adapters, settings.strength)
    one = AppliedEdit(label, settings.strength, adapters)
    patched.set_attachments(KEY, (*applied_edits(patched), one))
    count = len(constraints), int(constraints.moved.sum())
    return patched, EditReport(tuple(layers), count, edit.rank, edit.condition)


def without_edits(model: Any) -> Any:
    """A clone of a MODEL without the edits it carries; other patches stay."""
    ours = {id(patch) for edit in applied_edits(model) for patch in edit.adapters.values()}
    clone = model.clone()
    for edit in applied_edits(model):
        for key in edit.adapters:
            kept = [entry for entry in clone.patches.get(key, []) if id(entry[1]) not in ours]
            if kept:
                clone.patches[key] = kept
            else:
                clone.patches.pop(key, None)
    # Gives the clone an identity of its own, or ComfyUI would think the weights loaded already.
    clone.add_patches({})
    clone.remove_attachments(KEY)
    return clone


def chosen_keys(model: Any, layers: str, with_to_k: bool) -> list[str]:
    """Keys of the weights to edit.

    Raises:
        ValueError: when no layer's name contains any of the given parts.
    """
    parts = [part.strip() for part in layers.split(",") if part.strip()]
    names = [layer.name for layer in cross_attentions(model.model)]
    chosen = [name for name in names if not parts or any(part in name for part in parts)]
    if not chosen:
        raise ValueError(
            f"no cross-attention layer's name contains {' or '.join(map(repr, parts))}, so nothing "
            f"would be edited; the layers are called {names[0]}, ... {names[-1]}"
        )
    projections = ("to_k", "to_v") if with_to_k else ("to_v",)
    return [f"{_PREFIX}{name}.{part}.weight" for name in chosen for part in projections]


def total_changes(model: Any) -> dict[str, LowRank]:
    """Weight key -> the sum of all edits a MODEL carries.

    Raises:
        ValueError: for a MODEL without edits.
    """
    found: dict[str, list[LowRank]] = {}
    for edit in applied_edits(model):
        if edit.strength != 0:
            for key, change in edit.changes().items():
                found.setdefault(key, []).append(change)
    if not found:
        raise ValueError(
            "the model carries no edit (or only edits of strength 0): connect the MODEL output of "
            "Edit Assumption, Erase Concepts or Debias"
        )
    return {key: LowRank.total(changes) for key, changes in found.items()}


def _weights(model: Any, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    # As ComfyUI itself computes them when it loads a model, in fp32; nothing is loaded or changed.
    device = comfy.model_management.get_torch_device()
    entries = model.get_key_patches(_PREFIX)

    def weight(key: str) -> Tensor:
        (stored, convert), *patches = entries[key]
        cast = comfy.model_management.cast_to_device(stored, device, torch.float32, copy=True)
        return comfy.lora.calculate_weight(patches, convert(cast, inplace=True), key)

    return ((key, weight(key)) for key in keys)
