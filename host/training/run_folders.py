"""What training runs keep on disk: seen, counted, and thinned out."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ..files.concept_files import FOLDER
from .runs import ABOUT, RUNS, STATE

logger = logging.getLogger("perfusion")

# How many concepts along the way a finished run leaves, unless told otherwise.
MOST_CHECKPOINTS = 10
_STEP = re.compile(r"(?:step|sample)_(\d+)\.(?:safetensors|png)")


@dataclass(frozen=True)
class RunFolder:
    """One run's folder.

    Attributes:
        path: where it is.
        size: bytes of all its files.
        steps: those of which a concept is kept, in order.
        finished: whether nothing is left to go on with.
    """

    path: Path
    size: int
    steps: tuple[int, ...]
    finished: bool

    @property
    def line(self) -> str:
        """One line for people."""
        state = "finished" if self.finished else "can go on"
        count = "1 concept" if len(self.steps) == 1 else f"{len(self.steps)} concepts"
        last = f" up to step {self.steps[-1]}" if self.steps else ""
        return f"{self.path.name}: {self.size / 1e6:.1f} MB, {count}{last}, {state}"


def run_folders() -> list[RunFolder]:
    """Every run below models/perfusion/runs, the largest first."""
    root = Path(folder_paths.get_folder_paths(FOLDER)[0]) / RUNS
    folders = [path for path in root.glob("*") if path.is_dir() and (path / ABOUT).is_file()]
    return sorted((_look(path) for path in folders), key=lambda run: (-run.size, run.path.name))


def thin_out(run: RunFolder, most: int) -> int:
    """Keep at most `most` of a run's concepts and samples, evenly spaced and with the last.

    Returns the bytes that became free. What training goes on from stays.
    """
    kept = evenly_spaced(run.steps, most)
    freed = 0
    for file in run.path.iterdir():
        found = _STEP.fullmatch(file.name)
        step = int(found[1]) if found else None
        if step is not None and step in run.steps and step not in kept:
            freed += file.stat().st_size
            file.unlink()
    return freed


def thin_run(path: Path, most: int = MOST_CHECKPOINTS) -> None:
    """`thin_out` for a run that has just finished; a disk that refuses is only logged."""
    try:
        thin_out(_look(path), most)
    except OSError as error:
        logger.warning("%s: its checkpoints could not be thinned out (%s)", path, error)


def evenly_spaced(steps: Sequence[int], most: int) -> set[int]:
    """At most `most` of the steps, the last among them."""
    if len(steps) <= most:
        return set(steps)
    return {steps[len(steps) - 1 - at * len(steps) // most] for at in range(most)}


def delete(run: RunFolder) -> int:
    """Delete a finished run; returns the bytes that became free.

    Raises:
        ValueError: for a run that can go on.
    """
    if not run.finished:
        raise ValueError(
            f"{run.path.name}: expected a finished run, found one that can go on; let it finish, "
            f"or delete {run.path} yourself"
        )
    shutil.rmtree(run.path)
    return run.size


def _look(path: Path) -> RunFolder:
    files = [file for file in path.rglob("*") if file.is_file()]
    steps = sorted(
        int(found[1])
        for file in path.glob("step_*.safetensors")
        if (found := _STEP.fullmatch(file.name))
    )
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = {}
    done = isinstance(about, dict) and about.get("finished") is True
    size = sum(file.stat().st_size for file in files)
    return RunFolder(path, size, tuple(steps), done or not (path / STATE).exists())
