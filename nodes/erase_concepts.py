"""MACE's refinement and UCE's replacement in a graph: what a model shall forget."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.closed_form.edits import BOTH, REFINEMENT, REPLACEMENT, ToPreserve, erase_concepts
from ..host.closed_form.weight_patches import EditSettings
from ..perfusion.closed_form.uce import RIDGE
from ..perfusion.text.lines import lines_of
from .edit_inputs import CATEGORY, edited, model_and_clip, outputs, solving


class PerfusionEraseConcepts(io.ComfyNode):
    """Makes phrases mean something more general."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionEraseConcepts",
            display_name="Erase Concepts (Perfusion)",
            category=CATEGORY,
            description="Makes words mean something more general: after 'cat -> animal' the model "
            "no longer knows the word. Any number of words at once, no training (MACE, UCE).",
            search_aliases=["MACE", "UCE", "unlearn", "forget", "closed form"],
            inputs=[
                *model_and_clip(),
                io.String.Input(
                    "concepts",
                    default="cat -> thing",
                    multiline=True,
                    tooltip="One a line: target -> anchor. The anchor is a more general word; "
                    "without one it is 'thing'.",
                ),
                io.Combo.Input(
                    "method",
                    options=[BOTH, REPLACEMENT, REFINEMENT],
                    default=BOTH,
                    tooltip="replacement (UCE) erases the word itself. refinement (MACE) erases "
                    "only what the words around it still say of it: alone it leaves the word "
                    "working (in MACE a training does the rest). both does both.",
                ),
                io.String.Input(
                    "sentences",
                    default="",
                    multiline=True,
                    tooltip="Sentences to erase in, one a line, each with one {} for the words. "
                    "Empty: built-in ones.",
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
        method: str,
        sentences: str,
        ridge: float,
        with_to_k: bool,
        strength: float,
        layers: str,
        restart: bool,
        preserve: ToPreserve | None = None,
    ) -> io.NodeOutput:
        """The edited MODEL and the report, which is shown on the node too."""
        settings = EditSettings(ridge, strength, with_to_k, layers, restart)
        chosen = lines_of(sentences)
        return edited(erase_concepts(model, clip, concepts, method, chosen, settings, preserve))
