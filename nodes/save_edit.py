"""A model's edits as a LoRA file, in a graph."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host.closed_form.lora_files import DTYPES, FOLDER, write_edit
from ..host.files.numbered_files import prefix_problem
from .edit_inputs import CATEGORY


class PerfusionSaveEdit(io.ComfyNode):
    """Writes all edits that a model carries into one LoRA file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
    def execute(
        cls, model: io.Model.Type, filename_prefix: str, rank: int, precision: str
    ) -> io.NodeOutput:
        """The same MODEL; the file's name, size and error are shown on the node."""
        saved = write_edit(model, filename_prefix, rank or None, precision)
        text = (
            f"{saved.name} ({saved.size / 1000:.1f} kB), {saved.layers} projections, rank "
            f"{saved.rank}, error of the shorter rank {saved.error:.2g}"
        )
        return io.NodeOutput(model, ui=ui.PreviewText(text))
