"""What an edit shall leave as it is, in a graph."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.closed_form.edits import preserve_prompts
from ..perfusion.gated.covariance import Covariance
from ..perfusion.text.lines import lines_of
from .common_inputs import clip_input
from .edit_inputs import CATEGORY, LARGEST_RIDGE
from .kinds import CovarianceKind, PreserveKind


class PerfusionPreserve(io.ComfyNode):
    """Collects prompts and statistics that edits leave as they are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionPreserve",
            display_name="Preserve (Perfusion)",
            category=CATEGORY,
            description="Prompts and statistics that an editing node shall leave as they are.",
            inputs=[
                clip_input(),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="Prompts or captions to leave as they are, one a line.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=LARGEST_RIDGE,
                    step=0.01,
                    tooltip="How much each of their tokens counts beside an edited one's 1.",
                ),
                CovarianceKind.Input(
                    "covariance",
                    optional=True,
                    tooltip="Statistics from Measure Covariance, to preserve captions in general.",
                ),
                io.Float.Input(
                    "covariance_weight",
                    default=1000.0,
                    min=0.0,
                    max=1e9,
                    step=1.0,
                    tooltip="As how many tokens the statistics count.",
                    optional=True,
                ),
            ],
            outputs=[
                PreserveKind.Output(display_name="preserve", tooltip="For an editing node."),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip: io.Clip.Type,
        prompts: str,
        weight: float,
        covariance: Covariance | None = None,
        covariance_weight: float = 1000.0,
    ) -> io.NodeOutput:
        """What an editing node takes as its `preserve`."""
        return io.NodeOutput(
            preserve_prompts(clip, lines_of(prompts), weight, covariance, covariance_weight)
        )
