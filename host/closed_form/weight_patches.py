"""Closed-form edits on a ComfyUI model: ordinary weight patches that clones and LoRA live with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter.lora import LoRAAdapter
from torch.nn.functional import pad

from ...perfusion.closed_form.changes import changes_of
from ...perfusion.closed_form.constraints import Constraints
from ...perfusion.closed_form.low_rank import LowRank
from ...perfusion.closed_form.preserve import Preserved
from ...perfusion.closed_form.report import EditReport
from ...perfusion.closed_form.solver import solve
from ...perfusion.closed_form.uce import Debiasing
from .stored_weights import PREFIX, weights_of

KEY = "perfusion_edits"
T = TypeVar("T")


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
        debiased: what was counted for it, where it balances shares.
    """

    label: str
    strength: float
    adapters: Mapping[str, LoRAAdapter]
    debiased: tuple[Debiasing, ...] = ()

    def changes(self) -> dict[str, LowRank]:
        """Weight key -> the change at this edit's strength."""
        return {
            key: LowRank(adapter.weights[0], adapter.weights[1]).scaled(self.strength)
            for key, adapter in self.adapters.items()
        }


@dataclass(frozen=True, eq=False)
class Task:
    """What to ask of projections that read the same encodings.

    Attributes:
        keys: of their weights in the model.
        width: D, of the encodings they read.
        constraints: all of them, or parts of them one after the other.
        preserved: what to leave as it is.
        first_row: of the weights, from which on they are edited.
    """

    keys: Sequence[str]
    width: int
    constraints: Constraints | Iterable[Constraints]
    preserved: Preserved | None = None
    first_row: int = 0


def applied_edits(model: ModelPatcher) -> tuple[AppliedEdit, ...]:
    """The edits a MODEL carries, in the order in which they were made."""
    return model.get_attachment(KEY) or ()


def apply_edit(
    model: ModelPatcher,
    tasks: Iterable[Task],
    settings: EditSettings,
    label: str,
    debiased: tuple[Debiasing, ...] = (),
) -> tuple[ModelPatcher, EditReport]:
    """A clone of a MODEL with one more edit, and what the edit does.

    The edit is solved for the weights as the MODEL brings them, LoRA and earlier edits included.
    Strength 0 leaves every weight as it is.

    Args:
        model: the MODEL to edit.
        tasks: what to ask, one for each kind of encodings that the model reads.
        settings: how to solve, and where.
        label: what is edited, for people.
        debiased: what was counted for it, for edits that follow.

    Raises:
        ValueError: for constraints that cannot be met, for widths that differ, and for weights
            with NaN.
    """
    patched = without_edits(model) if settings.restart else model.clone()
    adapters: dict[str, LoRAAdapter] = {}
    reports = []
    for task in tasks:
        found, report = _solved(patched, task, settings.ridge)
        adapters |= found
        reports.append(report)
    if settings.strength != 0:
        patched.add_patches(adapters, settings.strength)
    one = AppliedEdit(label, settings.strength, adapters, debiased)
    patched.set_attachments(KEY, (*applied_edits(patched), one))
    return patched, EditReport.joined(reports)


def _solved(
    model: ModelPatcher, task: Task, ridge: float
) -> tuple[dict[str, LoRAAdapter], EditReport]:
    asked = task.constraints
    parts = [asked] if isinstance(asked, Constraints) else asked
    prior = task.preserved.prior if task.preserved else None
    edit = solve(_interruptible(parts), ridge, prior)
    if edit.width != task.width:
        raise ValueError(
            f"the encodings are {edit.width} wide, the model reads {task.width} wide "
            "ones; connect the CLIP that was loaded together with the model"
        )
    first = task.first_row
    weights = _interruptible(
        (_layer_name(key), weight[first:]) for key, weight in weights_of(model, task.keys)
    )
    changes, report = changes_of(weights, edit, task.preserved)
    adapters: dict[str, LoRAAdapter] = {}
    for key, change in zip(task.keys, changes.values(), strict=True):
        up = pad(change.up, (0, 0, first, 0)) if first else change.up
        adapters[key] = LoRAAdapter(set(), (up, change.down, None, None, None, None))
    return adapters, report


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
    return key.removeprefix(PREFIX).removesuffix(".weight")


def _interruptible(items: Iterable[T]) -> Iterator[T]:
    # Passes items on; a press on the interface's stop button ends the work between two of them.
    for item in items:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield item
