"""Masks of training pictures, without painting."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..host.pictures.auto_mask import AutoMaskOptions, auto_mask
from ..perfusion.masks.soft_masks import MaskOptions
from .common_inputs import clip_input, superclass_input, vae_input

DEFAULT = AutoMaskOptions()


class PerfusionAutoMask(io.ComfyNode):
    """Masks from the model's own attention to a word."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionAutoMask",
            display_name="Auto Mask (Perfusion)",
            category="perfusion/training",
            description="Finds a thing in pictures by where the model itself looks for the word, "
            "so that training learns the thing and not what is around it. No second network.",
            search_aliases=["perfusion", "segment", "attention map", "DAAM", "daam"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will be trained with; it stays as it is."
                ),
                clip_input(),
                vae_input(),
                io.Image.Input(
                    "images",
                    tooltip="Pictures of the thing, best with nothing like it beside it. Pictures "
                    "of different sizes come as a list.",
                ),
                superclass_input(),
                io.Float.Input(
                    "threshold",
                    default=DEFAULT.masks.threshold,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Where the mask begins, between the place the model looks at least (0) "
                    "and most (1). 0: found for each picture. Lower makes larger masks.",
                ),
                io.Float.Input(
                    "softness",
                    default=DEFAULT.masks.softness,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="How soft the edge of the mask is. 0: hard.",
                ),
                io.Boolean.Input(
                    "follow_edges",
                    default=DEFAULT.masks.edges,
                    optional=True,
                    tooltip="Bring the mask to the edges in the picture. Off: the blurred outline "
                    "the model sees.",
                ),
                io.Int.Input(
                    "draws",
                    default=DEFAULT.draws,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="How many times the model looks at each picture at each of two noise "
                    "levels. More is slower and a little steadier.",
                ),
                io.Int.Input(
                    "resolution",
                    default=DEFAULT.resolution,
                    min=0,
                    max=4096,
                    step=8,
                    optional=True,
                    advanced=True,
                    tooltip="Size at which the model looks: about this number squared of pixels. "
                    "0: the size it was trained on. The mask has the picture's size anyway.",
                ),
                io.Int.Input(
                    "seed",
                    default=DEFAULT.seed,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    optional=True,
                    advanced=True,
                    tooltip="Decides the noise; it matters little.",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    display_name="mask", tooltip="White where the thing is, for Train Concept."
                ),
                io.Image.Output(
                    display_name="overlay", tooltip="The pictures with their masks on them."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="How much of each picture the mask covers, and whether the thing was "
                    "found.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        images: Tensor,
        superclass: str,
        threshold: float = DEFAULT.masks.threshold,
        softness: float = DEFAULT.masks.softness,
        follow_edges: bool = DEFAULT.masks.edges,
        draws: int = DEFAULT.draws,
        resolution: int = DEFAULT.resolution,
        seed: int = DEFAULT.seed,
    ) -> io.NodeOutput:
        """MASK, IMAGE, STRING; the overlay and the report on the node."""
        masks = MaskOptions(threshold, softness, follow_edges)
        found = auto_mask(
            model, clip, vae, images, superclass, AutoMaskOptions(masks, draws, resolution, seed)
        )
        shown = {
            **ui.PreviewImage(found.overlay, cls=cls).as_dict(),
            **ui.PreviewText(found.report).as_dict(),
        }
        return io.NodeOutput(found.masks, found.overlay, found.report, ui=shown)
