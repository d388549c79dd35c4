"""What trainings left on disk, seen and cleaned."""

from __future__ import annotations

import time

from comfy_api.latest import io, ui

from ..host.training.run_folders import RunFolder, delete, run_folders, thin_out

SHOW, THIN, DELETE = "show", "thin out", "delete finished"


class PerfusionTrainingRuns(io.ComfyNode):
    """The folders of training runs: how large they are, and fewer of them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The list, what to do with it, and to which of the runs."""
        return io.Schema(
            node_id="PerfusionTrainingRuns",
            display_name="Training Runs (Perfusion)",
            category="perfusion/training",
            description="Shows what trainings keep in models/perfusion/runs, and makes room there. "
            "Saved concepts are never touched.",
            search_aliases=["perfusion", "clean", "disk", "checkpoints"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "action",
                    options=[SHOW, THIN, DELETE],
                    default=SHOW,
                    tooltip="show: only looks. thin out: keeps a few concepts of each run, evenly "
                    "spaced and with the last. delete finished: removes runs that came to their "
                    "end; those that can go on stay.",
                ),
                io.Int.Input(
                    "keep",
                    default=3,
                    min=1,
                    max=1000,
                    tooltip="How many concepts of each run thinning out leaves.",
                ),
                io.String.Input(
                    "only",
                    default="",
                    tooltip="Only runs whose name holds this text. Empty: all.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="report", tooltip="A line for each run, and the sum of them."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, action: str, keep: int, only: str) -> float:
        """Looks every time: what is on the disk may have changed."""
        return time.time()

    @classmethod
    def execute(cls, action: str, keep: int, only: str) -> io.NodeOutput:
        """STRING; the report as text on the node."""
        runs = [run for run in run_folders() if only.strip() in run.path.name]
        lines, freed = [], 0
        for run in runs:
            done, bytes_freed = _act(run, action, keep)
            lines.append(f"{run.line}{done}")
            freed += bytes_freed
        total = sum(run.size for run in runs)
        lines.append(f"{len(runs)} runs, {total / 1e6:.1f} MB before, {freed / 1e6:.1f} MB freed")
        report = "\n".join(lines)
        return io.NodeOutput(report, ui=ui.PreviewText(report))


def _act(run: RunFolder, action: str, keep: int) -> tuple[str, int]:
    """What to say of it, and the bytes that became free."""
    if action == THIN:
        return f", thinned out to at most {keep}", thin_out(run, keep)
    if action == DELETE and run.finished:
        return ", deleted", delete(run)
    return "", 0
