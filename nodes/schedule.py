"""A concept's gate over the course of sampling."""

from __future__ import annotations

from comfy_api.latest import io

from ..perfusion.concept.concept import Concept
from ..perfusion.gated.gate_schedule import GateSchedule
from .kinds import ConceptKind


class PerfusionScheduleGate(io.ComfyNode):
    """A concept that acts only at times and in places."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionScheduleGate",
            display_name="Schedule Concept Gate (Perfusion)",
            category="perfusion/concept",
            description="Lets a concept act in a part of the sampling and of the model only, with "
            "a gate that moves from start to end. Elsewhere the concept changes nothing.",
            search_aliases=["perfusion", "timestep range", "block weight"],
            inputs=[
                ConceptKind.Input("concept", tooltip="The concept to schedule."),
                _percent("start_percent", 0.0, "Where the concept begins to act. 0 is pure noise."),
                _percent("end_percent", 1.0, "Where it ceases to act. 1 is the finished picture."),
                _bias("bias_start", "Bias at the start of the range (see Set Concept Gate)."),
                _bias("bias_end", "Bias at the end of the range; in between it moves evenly."),
                _temperature("temperature_start", "Softness of the gate at the start."),
                _temperature("temperature_end", "Softness of the gate at the end."),
                io.String.Input(
                    "blocks",
                    default="",
                    tooltip="Where in the model it acts: down, middle, up, or blocks such as "
                    "input_blocks.4, separated by commas. Empty: everywhere.",
                ),
            ],
            outputs=[ConceptKind.Output(display_name="concept", tooltip="The scheduled concept.")],
        )

    @classmethod
    def execute(
        cls,
        concept: Concept,
        start_percent: float,
        end_percent: float,
        bias_start: float,
        bias_end: float,
        temperature_start: float,
        temperature_end: float,
        blocks: str,
    ) -> io.NodeOutput:
        """PERFUSION_CONCEPT."""
        schedule = GateSchedule(
            start_percent,
            end_percent,
            (bias_start, bias_end),
            (temperature_start, temperature_end),
            tuple(name.strip() for name in blocks.split(",") if name.strip()),
        )
        return io.NodeOutput(concept.with_schedule(schedule))


def _percent(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.001, tooltip=tooltip)


def _bias(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=0.65, min=-2.0, max=2.0, step=0.01, tooltip=tooltip)


def _temperature(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=0.15, min=0.01, max=5.0, step=0.01, tooltip=tooltip)
