"""A model's edits as a LoRA file that ComfyUI's own loader and others read."""

from __future__ import annotations

import json
from dataclasses import dataclass

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher

from ...perfusion.closed_form.low_rank import LowRank, lora_tensors
from ...perfusion.files.safe_file import write_atomically
from ..files.numbered_files import numbered_file
from .weight_patches import applied_edits, total_changes

FOLDER = "loras"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class SavedEdit:
    """What was written.

    Attributes:
        name: as the LoRA loader's menu shows it.
        size: bytes.
        layers: how many projections are in it.
        rank: the largest one.
        error: largest relative error (Frobenius) of a projection's change through truncation.
    """

    name: str
    size: int
    layers: int
    rank: int
    error: float


def write_edit(
    model: ModelPatcher, filename_prefix: str, rank: int | None, dtype: str
) -> SavedEdit:
    """Save all edits a MODEL carries, at their strengths, into models/loras.

    Without a rank nothing is left out but what is numerically zero.

    Raises:
        ValueError: for a MODEL without edits, a prefix that leaves the folder, and values that the
            dtype cannot hold.
    """
    names = lora_names(model)
    changes: dict[str, LowRank] = {}
    errors = [0.0]
    for key, change in total_changes(model).items():
        changes[names[key]], error = change.truncated(rank)
        errors.append(error)
    labels = [{"edit": edit.label, "strength": edit.strength} for edit in applied_edits(model)]
    metadata = {
        "perfusion.edits": json.dumps(labels, ensure_ascii=False),
        "perfusion.truncation_error": f"{max(errors):.3g}",
    }
    tensors = lora_tensors(changes, DTYPES[dtype])
    path, shown = numbered_file(FOLDER, filename_prefix)
    write_atomically(path, tensors, metadata)
    return SavedEdit(
        name=shown,
        size=path.stat().st_size,
        layers=len(changes),
        rank=max(change.rank for change in changes.values()),
        error=max(errors),
    )


def lora_names(model: ModelPatcher) -> dict[str, str]:
    """Weight key -> the layer's name in LoRA files: diffusers' where it has one."""
    found: dict[str, str] = {}
    for name, key in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        # Diffusers' names come last; they are what other programs know.
        if name.startswith("lora_unet_"):
            found[key] = name
    return found
