"""Closed-form edits on a ComfyUI model: ordinary weight patches that clones and LoRA live with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import comfy.lora
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy.weight_adapter.lora import LoRAAdapter

from ...perfusion.closed_form.changes import changes_of
from ...perfusion.closed_form.constraints import Constraints
from ...perfusion.closed_form.low_rank import LowRank
from ...perfusion.closed_form.preserve import Preserved
from ...perfusion.closed_form.report import EditReport
from ...perfusion.closed_form.solver import solve
from ...perfusion.shapes import Weight
from ..models.families import check_clip, cross_attentions, family_of

KEY = "perfusion_edits"
T = TypeVar("T")
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


def check_pair(model: ModelPatcher, clip: CLIP) -> None:
    """Make sure a MODEL can be edited with this CLIP.

    Raises:
        UnsupportedModelError: for other models, and for the CLIP of another family.
    """
    check_clip(clip, family_of(model.model))


def applied_edits(model: ModelPatcher) -> tuple[AppliedEdit, ...]:
    """The edits a MODEL carries, in the order in which they were made."""
    return model.get_attachment(KEY) or ()


def apply_edit(
    model: ModelPatcher,
    constraints: Constraints | Iterable[Constraints],
    settings: EditSettings,
    label: str,
    preserved: Preserved | None = None,
) -> tuple[ModelPatcher, EditReport]:
    """A clone of a MODEL with one more edit, and what the edit does.

    The edit is solved for the weights as the MODEL brings them, LoRA and earlier edits included.
    Strength 0 leaves every weight as it is.

    Args:
        model: the MODEL to edit.
        constraints: all of them, or parts of them one after the other.
        settings: how to solve, and where.
        label: what is edited, for people.
        preserved: what to leave as it is.

    Raises:
        ValueError: when no layer is chosen, for constraints that cannot be met, for widths that
            differ, and for weights with NaN.
    """
    family = family_of(model.model)
    keys = chosen_keys(model, settings.layers, settings.with_to_k)
    parts = [constraints] if isinstance(constraints, Constraints) else constraints
    edit = solve(_interruptible(parts), settings.ridge, preserved.prior if preserved else None)
    if edit.width != family.width:
        raise ValueError(
            f"the encodings are {edit.width} wide, {family.label} reads {family.width} wide "
            "ones; connect the CLIP that was loaded together with the model"
        )
    patched = without_edits(model) if settings.restart else model.clone()
    weights = _interruptible((_layer_name(key), weight) for key, weight in _weights(patched, keys))
    changes, report = changes_of(weights, edit, preserved)
    adapters = {
        key: LoRAAdapter(set(), (change.up, change.down, None, None, None, None))
        for key, change in zip(keys, changes.values(), strict=True)
    }
    if settings.strength != 0:
        patched.add_patches(adapters, settings.strength)
    one = AppliedEdit(label, settings.strength, adapters)
    patched.set_attachments(KEY, (*applied_edits(patched), one))
    return patched, report


def without_edits(model: ModelPatcher) -> ModelPatcher:
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


def chosen_keys(model: ModelPatcher, layers: str, with_to_k: bool) -> list[str]:
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


def total_changes(model: ModelPatcher) -> dict[str, LowRank]:
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


def _layer_name(key: str) -> str:
    return key.removeprefix(_PREFIX).removesuffix(".weight")


def _interruptible(items: Iterable[T]) -> Iterator[T]:
    # Passes items on; a press on the interface's stop button ends the work between two of them.
    for item in items:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield item


def _weights(model: ModelPatcher, keys: Sequence[str]) -> Iterator[tuple[str, Weight]]:
    # As ComfyUI itself computes them when it loads a model, in fp32; nothing is loaded or changed.
    device = comfy.model_management.get_torch_device()
    entries = model.get_key_patches(_PREFIX)

    def weight(key: str) -> Weight:
        (stored, convert), *patches = entries[key]
        cast = comfy.model_management.cast_to_device(stored, device, torch.float32, copy=True)
        return comfy.lora.calculate_weight(patches, convert(cast, inplace=True), key)

    return ((key, weight(key)) for key in keys)
