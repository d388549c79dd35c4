"""The small world in a graph: its model and pictures of its personal things."""

from __future__ import annotations

from comfy_api.latest import io

from ..demo.model.small_model import load_small_model
from ..demo.things import SUBJECTS
from ..demo.world import personal_pictures, world_weights

CATEGORY = "perfusion/demo"


class PerfusionDemoModel(io.ComfyNode):
    """The small world's model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionDemoModel",
            display_name="Load Demo Model (Perfusion)",
            category=CATEGORY,
            description="A very small text-to-image model that comes with the pack, to try "
            "everything without downloads. A checkpoint loader takes its place.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The small world's model."),
                io.Clip.Output(display_name="CLIP", tooltip="Its text encoder."),
                io.Vae.Output(display_name="VAE", tooltip="Its autoencoder."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """MODEL, CLIP, VAE."""
        return io.NodeOutput(*load_small_model(world_weights()))


class PerfusionDemoImages(io.ComfyNode):
    """Pictures of a personal thing of the small world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionDemoImages",
            display_name="Demo Images (Perfusion)",
            category=CATEGORY,
            description="Pictures of a thing the demo model has no word for, to train on.",
            inputs=[
                io.Combo.Input(
                    "subject", options=list(SUBJECTS), tooltip="Which of the personal things."
                ),
                io.Int.Input(
                    "count", default=5, min=1, max=64, tooltip="How many pictures; 4 to 6 suffice."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Another seed shows the same thing in other pictures.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="The pictures."),
                io.Mask.Output(display_name="MASK", tooltip="White where the thing is."),
            ],
        )

    @classmethod
    def execute(cls, subject: str, count: int, seed: int) -> io.NodeOutput:
        """IMAGE, MASK."""
        return io.NodeOutput(*personal_pictures(subject, count, seed))
