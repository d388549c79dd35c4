"""Concepts in a graph: load, set the gate, apply, save."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..host.files.concept_files import (
    FOLDER,
    concept_names,
    concept_path,
    fingerprint,
    read_concept,
    write_concept,
)
from ..host.files.numbered_files import prefix_problem
from ..host.injection.apply import apply_concepts
from ..host.injection.key_locks import DEFAULT_KEY_LOCK, KEY_LOCKS, KeyLock
from ..host.pictures.thumbnails import thumbnail_of, thumbnail_url
from ..perfusion.concept.concept import Concept
from ..perfusion.concept.metadata import describe, with_thumbnail
from .common_inputs import clip_input
from .kinds import ConceptKind

CATEGORY = "perfusion"
MOST_CONCEPTS = 32


class PerfusionLoadConcept(io.ComfyNode):
    """A concept from models/perfusion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionLoadConcept",
            display_name="Load Concept (Perfusion)",
            category=f"{CATEGORY}/concept",
            description="Loads a trained concept from models/perfusion.",
            search_aliases=["perfusion", "textual inversion", "personalize"],
            inputs=[
                io.Combo.Input(
                    "concept_name",
                    options=concept_names(),
                    tooltip="The concept file, from models/perfusion and its sub-folders.",
                ),
            ],
            outputs=[ConceptKind.Output(display_name="concept", tooltip="The concept.")],
        )

    @classmethod
    def validate_inputs(cls, concept_name: str | None = None) -> bool | str:
        """Any concept file there is, also one newer than the menu; else which one, and whence."""
        if not concept_name:
            return True  # It comes over a wire, and is looked at when it is there.
        try:
            concept_path(concept_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, concept_name: str) -> str:
        """Loads again when the file has changed."""
        return fingerprint(concept_name)

    @classmethod
    def execute(cls, concept_name: str) -> io.NodeOutput:
        """PERFUSION_CONCEPT."""
        return io.NodeOutput(read_concept(concept_name))


class PerfusionSetGate(io.ComfyNode):
    """Another gate for a concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionSetGate",
            display_name="Set Concept Gate (Perfusion)",
            category=f"{CATEGORY}/concept",
            description="Sets how readily and how strongly a concept takes effect.",
            inputs=[
                ConceptKind.Input("concept", tooltip="The concept to change."),
                io.Float.Input(
                    "bias",
                    default=0.65,
                    min=-2.0,
                    max=2.0,
                    step=0.01,
                    tooltip="How similar a word must be to the concept before its gate opens. "
                    "Lower: more of the concept. 0.60 to 0.75 is usual.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.15,
                    min=0.01,
                    max=5.0,
                    step=0.01,
                    tooltip="How soft the gate is: small values open it abruptly at the bias, "
                    "large ones gradually.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much of the edit is applied. 0 leaves the model exactly as it "
                    "is; the placeholder then is only its learned word vector, with twin lock its "
                    "everyday word.",
                ),
            ],
            outputs=[ConceptKind.Output(display_name="concept", tooltip="The changed concept.")],
        )

    @classmethod
    def execute(
        cls, concept: Concept, bias: float, temperature: float, strength: float
    ) -> io.NodeOutput:
        """PERFUSION_CONCEPT."""
        return io.NodeOutput(concept.with_gate(bias, temperature, strength))


class PerfusionApplyConcepts(io.ComfyNode):
    """Concepts on a model and its text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        concepts = io.Autogrow.TemplatePrefix(
            ConceptKind.Input("concept", tooltip="A concept to use."),
            prefix="concept",
            min=0,
            max=MOST_CONCEPTS,
        )
        return io.Schema(
            node_id="PerfusionApplyConcepts",
            display_name="Apply Concepts (Perfusion)",
            category=CATEGORY,
            description="Makes the model draw the concepts where their placeholders stand in a "
            "prompt. Several of these nodes in a row add up.",
            inputs=[
                io.Model.Input("model", tooltip="The model the concepts were trained for."),
                clip_input(),
                io.Autogrow.Input(
                    "concepts",
                    template=concepts,
                    tooltip="The concepts to use together; a new socket appears for each.",
                ),
                io.Combo.Input(
                    "key_lock",
                    options=list(KEY_LOCKS),
                    default=DEFAULT_KEY_LOCK,
                    optional=True,
                    tooltip="How a concept takes its everyday word's place. twin: the prompt reads "
                    "as if the everyday word stood there, and the concept changes only how it "
                    "looks; an everyday word keeps its meaning, and a prompt that does not name "
                    "the concept gives bit for bit the base model's picture. local: the concept's "
                    "own word is placed as its everyday word would be. global: all words are, by "
                    "the prompt with the everyday words; the paper uses a bias of 0.40 to 0.60 "
                    "there. Concepts trained with twin lock need twin.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the concepts."),
                io.Clip.Output(
                    display_name="CLIP",
                    tooltip="The text encoder that knows the placeholders; write them in prompts.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        concepts: dict[str, Concept | None] | None = None,
        key_lock: KeyLock = DEFAULT_KEY_LOCK,
    ) -> io.NodeOutput:
        """MODEL, CLIP."""
        chosen = [concept for concept in (concepts or {}).values() if concept is not None]
        return io.NodeOutput(*apply_concepts(model, clip, chosen, key_lock))


class PerfusionSaveConcept(io.ComfyNode):
    """A concept into models/perfusion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionSaveConcept",
            display_name="Save Concept (Perfusion)",
            category=f"{CATEGORY}/concept",
            description="Saves a concept into models/perfusion, where Load Concept finds it.",
            is_output_node=True,
            inputs=[
                ConceptKind.Input("concept", tooltip="The concept to save."),
                io.String.Input(
                    "filename_prefix",
                    default="concept",
                    tooltip="Start of the file name, a number follows. May hold sub-folders and "
                    "variables such as %year%.",
                ),
                io.Image.Input(
                    "thumbnail",
                    optional=True,
                    tooltip="A picture to keep in the file, which lists of models can show: the "
                    "middle square of the first one, made small. Adds up to 6 kB to the file.",
                ),
            ],
            outputs=[ConceptKind.Output(display_name="concept", tooltip="The concept as saved.")],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        """Refuses a bad name before anything is trained for it."""
        return prefix_problem(FOLDER, filename_prefix)

    @classmethod
    def execute(
        cls, concept: Concept, filename_prefix: str, thumbnail: Tensor | None = None
    ) -> io.NodeOutput:
        """PERFUSION_CONCEPT; the file's name and size as text on the node."""
        if thumbnail is not None:
            concept = with_thumbnail(concept, thumbnail_url(thumbnail))
        name, size = write_concept(concept, filename_prefix)
        text = f"{name} ({size / 1000:.1f} kB), placeholder {concept.placeholder}"
        return io.NodeOutput(concept, ui=ui.PreviewText(text))


class PerfusionConceptInfo(io.ComfyNode):
    """What is in a concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionConceptInfo",
            display_name="Concept Info (Perfusion)",
            category=f"{CATEGORY}/concept",
            description="Shows what a concept says about itself: its word, gates, layers, how it "
            "was trained, and its picture.",
            search_aliases=["perfusion", "metadata", "trigger word"],
            is_output_node=True,
            inputs=[ConceptKind.Input("concept", tooltip="The concept to look at.")],
            outputs=[
                io.String.Output(display_name="text", tooltip="All of it, one thing a line."),
                io.Image.Output(
                    display_name="thumbnail",
                    tooltip="The picture kept in the file; plain grey when there is none.",
                ),
                io.String.Output(
                    display_name="trigger_phrase", tooltip="The word to write in prompts."
                ),
            ],
        )

    @classmethod
    def execute(cls, concept: Concept) -> io.NodeOutput:
        """STRING, IMAGE, STRING; text and picture on the node."""
        picture, note = thumbnail_of(concept)
        text = describe(concept, note)
        shown = {**ui.PreviewImage(picture).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(text, picture, concept.placeholder, ui=shown)
