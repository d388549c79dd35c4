"""Editing in a graph: what a model assumes, what it shall forget, what it shall keep."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..host.closed_form.edits import (
    BOTH,
    REFINEMENT,
    REPLACEMENT,
    debias,
    edit_assumption,
    erase_concepts,
    preserve_prompts,
)
from ..host.closed_form.lora_files import DTYPES, FOLDER, write_edit
from ..host.closed_form.weight_patches import EditSettings
from ..host.files.numbered_files import prefix_problem
from ..host.text.caption_sources import sentences_known_to
from ..perfusion.closed_form.preserve import Preserved
from ..perfusion.closed_form.time import RIDGE as TIME_RIDGE
from ..perfusion.closed_form.uce import RIDGE as UCE_RIDGE
from ..perfusion.closed_form.uce import Debiasing
from ..perfusion.gated.covariance import Covariance
from .kinds import CovarianceKind, PreserveKind

CATEGORY = "perfusion/editing"
LARGEST_RIDGE = 1e6


def _model_and_clip() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The model to edit; LoRA and edits on it count."),
        io.Clip.Input("clip", tooltip="The text encoder loaded together with the model."),
    ]


def _solving(ridge: float) -> list[Any]:
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
            tooltip="Edit the keys besides the values: where the words act besides what they say.",
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


def _outputs() -> list[Any]:
    return [
        io.Model.Output(display_name="MODEL", tooltip="The edited model; others stay as they are."),
        io.String.Output(
            display_name="report",
            tooltip="Layers, size of the change, what is not met, drift, condition number.",
        ),
    ]


def _edited(result: tuple[Any, str]) -> io.NodeOutput:
    model, report = result
    return io.NodeOutput(model, report, ui=ui.PreviewText(report))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


class PerfusionEditAssumption(io.ComfyNode):
    """TIME's edit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs."""
        return io.Schema(
            node_id="PerfusionEditAssumption",
            display_name="Edit Assumption (Perfusion)",
            category=CATEGORY,
            description="Changes what a model assumes where a prompt leaves it open: after "
            "'a mug' -> 'a blue mug' mugs are blue. Takes a second and no pictures (TIME).",
            search_aliases=["TIME", "model editing", "closed form"],
            inputs=[
                *_model_and_clip(),
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
                *_solving(TIME_RIDGE),
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
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        source: str,
        destination: str,
        augment: bool,
        ridge: float,
        with_to_k: bool,
        strength: float,
        layers: str,
        restart: bool,
        preserve: Preserved | None = None,
        carry: float = 0.0,
        with_padding: bool = True,
    ) -> io.NodeOutput:
        """MODEL, STRING; the report as text on the node."""
        settings = EditSettings(ridge, strength, with_to_k, layers, restart)
        edit = source, destination, augment, carry, with_padding
        return _edited(edit_assumption(model, clip, *edit, settings, preserve))


class PerfusionEraseConcepts(io.ComfyNode):
    """MACE's refinement and UCE's erasing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs."""
        return io.Schema(
            node_id="PerfusionEraseConcepts",
            display_name="Erase Concepts (Perfusion)",
            category=CATEGORY,
            description="Makes words mean something more general: after 'cat -> animal' the model "
            "no longer knows the word. Any number of words at once, no training (MACE, UCE).",
            search_aliases=["MACE", "UCE", "unlearn", "forget", "closed form"],
            inputs=[
                *_model_and_clip(),
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
                    tooltip="replacement (UCE) changes the words themselves, refinement (MACE) "
                    "only what the words around them still say of them.",
                ),
                io.String.Input(
                    "sentences",
                    default="",
                    multiline=True,
                    tooltip="Sentences to erase in, one a line, each with one {} for the words. "
                    "Empty: built-in ones.",
                ),
                *_solving(UCE_RIDGE),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        concepts: str,
        method: str,
        sentences: str,
        ridge: float,
        with_to_k: bool,
        strength: float,
        layers: str,
        restart: bool,
        preserve: Preserved | None = None,
    ) -> io.NodeOutput:
        """MODEL, STRING; the report as text on the node."""
        settings = EditSettings(ridge, strength, with_to_k, layers, restart)
        chosen = _lines(sentences) or sentences_known_to(clip)
        return _edited(erase_concepts(model, clip, concepts, method, chosen, settings, preserve))


class PerfusionDebias(io.ComfyNode):
    """UCE's debiasing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs."""
        return io.Schema(
            node_id="PerfusionDebias",
            display_name="Debias (Perfusion)",
            category=CATEGORY,
            description="Shifts how often pictures of a concept show each of some attributes "
            "(UCE). Draw pictures, count, edit, and count again.",
            search_aliases=["UCE", "bias", "closed form"],
            inputs=[
                *_model_and_clip(),
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
                    tooltip="How far to push for what is missing. Measure again afterwards and "
                    "add a further node if it was not enough.",
                ),
                *_solving(UCE_RIDGE),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
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
        preserve: Preserved | None = None,
    ) -> io.NodeOutput:
        """MODEL, STRING; the report as text on the node."""
        settings = EditSettings(ridge, strength, with_to_k, layers, restart)
        debiasings = [
            Debiasing(
                concept,
                tuple(line.replace("{}", concept) for line in _lines(attributes)),
                _shares("measured", measured),
                _shares("wanted", wanted),
                step,
            )
            for concept in _lines(concepts)
        ]
        return _edited(debias(model, clip, debiasings, settings, preserve))


class PerfusionPreserve(io.ComfyNode):
    """What edits leave alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs."""
        return io.Schema(
            node_id="PerfusionPreserve",
            display_name="Preserve (Perfusion)",
            category=CATEGORY,
            description="Prompts and statistics that an editing node shall leave as they are.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder loaded together with the model."),
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
        clip: Any,
        prompts: str,
        weight: float,
        covariance: Covariance | None = None,
        covariance_weight: float = 1000.0,
    ) -> io.NodeOutput:
        """PERFUSION_PRESERVE."""
        return io.NodeOutput(
            preserve_prompts(clip, _lines(prompts), weight, covariance, covariance_weight)
        )


class PerfusionSaveEdit(io.ComfyNode):
    """Edits as a LoRA file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs."""
        return io.Schema(
            node_id="PerfusionSaveEdit",
            display_name="Save Edit as LoRA (Perfusion)",
            category=CATEGORY,
            description="Saves all edits a model carries as a LoRA file in models/loras, which "
            "the stock Load LoRA node and other programs read.",
            search_aliases=["LoRA", "export"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The edited model."),
                io.String.Input(
                    "filename_prefix",
                    default="edit",
                    tooltip="Start of the file name, a number follows. May hold sub-folders and "
                    "variables such as %year%.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Largest rank; less makes a smaller file, the error is stated. 0: the "
                    "whole edit.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(DTYPES),
                    default="fp16",
                    tooltip="Of the numbers in the file.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The same model.")],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        """Refuses a bad name before anything is computed for it."""
        return prefix_problem(FOLDER, filename_prefix)

    @classmethod
    def execute(cls, model: Any, filename_prefix: str, rank: int, precision: str) -> io.NodeOutput:
        """MODEL; the file's name, size and error as text on the node."""
        saved = write_edit(model, filename_prefix, rank or None, precision)
        text = (
            f"{saved.name} ({saved.size / 1000:.1f} kB), {saved.layers} projections, rank "
            f"{saved.rank}, error of the shorter rank {saved.error:.2g}"
        )
        return io.NodeOutput(model, ui=ui.PreviewText(text))


def _shares(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(
            f"{name}: expected numbers separated by commas such as 0.9, 0.1, found {text!r}"
        ) from error
