"""TIME's edit in a graph: what a model assumes where a prompt leaves it open."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.closed_form.edits import ToPreserve, edit_assumption
from ..host.closed_form.weight_patches import EditSettings
from ..perfusion.closed_form.time import RIDGE
from .edit_inputs import CATEGORY, edited, model_and_clip, outputs, solving


class PerfusionEditAssumption(io.ComfyNode):
    """Makes a prompt mean what the same prompt with words added means."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionEditAssumption",
            display_name="Edit Assumption (Perfusion)",
            category=CATEGORY,
            description="Changes what a model assumes where a prompt leaves it open: after "
            "'a mug' -> 'a blue mug' mugs are blue. Takes a second and no pictures (TIME).",
            search_aliases=["TIME", "model editing", "closed form"],
            inputs=[
                *model_and_clip(),
                io.String.Input(
                    "source",
                    default="a mug",
                    tooltip="The prompt that leaves something open.",
                ),
                io.String.Input(
                    "destination",
                    default="a blue mug",
                    tooltip="The same prompt with the words added that shall be assumed.",
                ),
                io.Boolean.Input(
                    "augment",
                    default=True,
                    tooltip="Edit it behind 'A photo of', 'An image of' and 'A picture of' too.",
                ),
                *solving(RIDGE),
                io.Float.Input(
                    "carry",
                    default=0.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    optional=True,
                    tooltip="How much of an added word's own meaning the word beside it takes on. "
                    "0 is the paper's method; about 0.7 helps where its edits change too little.",
                ),
                io.Boolean.Input(
                    "with_padding",
                    default=True,
                    optional=True,
                    tooltip="Match what follows the words too, as the paper does. Off: edit the "
                    "words only, which touches the rest of the model much less.",
                ),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        source: str,
        destination: str,
        augment: bool,
        ridge: float,
        with_to_k: bool,
        strength: float,
        layers: str,
        restart: bool,
        preserve: ToPreserve | None = None,
        carry: float = 0.0,
        with_padding: bool = True,
    ) -> io.NodeOutput:
        """The edited MODEL and the report, which is shown on the node too."""
        settings = EditSettings(ridge, strength, with_to_k, layers, restart)
        edit = source, destination, augment, carry, with_padding
        return edited(edit_assumption(model, clip, *edit, settings, preserve))
