"""Inputs and outputs that the editing nodes share."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .common_inputs import clip_input
from .kinds import PreserveKind

CATEGORY = "perfusion/editing"
LARGEST_RIDGE = 1e6


def model_and_clip() -> list[io.Input]:
    """What is edited."""
    return [
        io.Model.Input(
            "model",
            tooltip="The model to edit; LoRA and edits on it count. SD1.x, SD2, SDXL, Anima, "
            "Cosmos-Predict2, Wan, PixArt, LTX-Video, and Flux.1, Chroma, SD3, Qwen-Image, "
            "Z-Image, Lumina 2, HiDream, AuraFlow.",
        ),
        clip_input(),
    ]


def solving(ridge: float) -> list[io.Input]:
    """How an edit is solved and where it is put, with the method's own lambda as the default."""
    return [
        io.Float.Input(
            "ridge",
            default=ridge,
            min=0.0,
            max=LARGEST_RIDGE,
            step=0.01,
            tooltip="Lambda: the more, the closer the model stays to what it was, and the less is "
            "edited. 0 needs Preserve with the statistics of many captions.",
        ),
        io.Boolean.Input(
            "with_to_k",
            default=True,
            tooltip="Edit the keys besides the values: where the words act besides what they say. "
            "Stays on for models that read the text through one map (Flux, Qwen-Image, ...).",
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=-4.0,
            max=4.0,
            step=0.05,
            tooltip="How much of the edit is applied; 0 leaves the model as it is.",
        ),
        io.String.Input(
            "layers",
            default="",
            tooltip="Edit only the layers whose name contains one of these parts, separated by "
            "commas, such as: middle_block, output_blocks. Empty: all layers.",
        ),
        io.Boolean.Input(
            "restart",
            default=False,
            tooltip="Drop the edits of the nodes before this one instead of building on them.",
        ),
        PreserveKind.Input(
            "preserve", optional=True, tooltip="What to leave as it is, from Preserve."
        ),
    ]


def outputs() -> list[io.Output]:
    """The edited MODEL and the report on it."""
    return [
        io.Model.Output(display_name="MODEL", tooltip="The edited model; others stay as they are."),
        io.String.Output(
            display_name="report",
            tooltip="Layers, size of the change, what is not met, drift, condition number; what "
            "else tells the model of the text and is not edited.",
        ),
    ]


def edited(result: tuple[io.Model.Type, str]) -> io.NodeOutput:
    """The outputs' values; the report is shown on the node as well."""
    model, report = result
    return io.NodeOutput(model, report, ui=ui.PreviewText(report))
