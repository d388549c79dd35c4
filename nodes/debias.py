"""UCE's debiasing in a graph: how often pictures of a concept show each attribute."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.closed_form.edits import ToPreserve, debias
from ..host.closed_form.weight_patches import EditSettings
from ..perfusion.closed_form.uce import RIDGE, Debiasing
from ..perfusion.text.lines import lines_of
from .edit_inputs import CATEGORY, edited, model_and_clip, outputs, solving


class PerfusionDebias(io.ComfyNode):
    """Shifts the shares of attributes in pictures of concepts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionDebias",
            display_name="Debias (Perfusion)",
            category=CATEGORY,
            description="Shifts how often pictures of a concept show each of some attributes "
            "(UCE). Draw pictures, count, edit, and count again.",
            search_aliases=["UCE", "bias", "closed form"],
            inputs=[
                *model_and_clip(),
                io.String.Input(
                    "concepts",
                    default="mug",
                    multiline=True,
                    tooltip="The words whose pictures are one-sided, one a line.",
                ),
                io.String.Input(
                    "attributes",
                    default="white\nblue",
                    multiline=True,
                    tooltip="Words for what the pictures can show, one a line, two or more; {} "
                    "stands for the concept, as in: female {}.",
                ),
                io.String.Input(
                    "measured",
                    default="0.9, 0.1",
                    tooltip="Shares of the attributes counted in the model's pictures now, in the "
                    "same order, separated by commas; they add up to 1.",
                ),
                io.String.Input(
                    "wanted",
                    default="",
                    tooltip="Shares to reach. Empty: equal ones.",
                ),
                io.Float.Input(
                    "step",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    tooltip="How far to push for what is missing. Count again afterwards and "
                    "add a further node with the new count; where this one went too far, that "
                    "one goes back by less.",
                ),
                *solving(RIDGE),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        concepts: str,
        attributes: str,
        measured: str,
        wanted: str,
        step: float,
        ridge: float,
        with_to_k: bool,
        strength: float,
        layers: str,
        restart: bool,
        preserve: ToPreserve | None = None,
    ) -> io.NodeOutput:
        """The edited MODEL and the report, which is shown on the node too."""
        settings = EditSettings(ridge, strength, with_to_k, layers, restart)
        debiasings = [
            Debiasing(
                concept,
                tuple(line.replace("{}", concept) for line in lines_of(attributes)),
                _shares("measured", measured),
                _shares("wanted", wanted),
                step,
            )
            for concept in lines_of(concepts)
        ]
        return edited(debias(model, clip, debiasings, settings, preserve))


def _shares(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(
            f"{name}: expected numbers separated by commas such as 0.9, 0.1, found {text!r}"
        ) from error
