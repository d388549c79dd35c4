"""The folder of a training run: what it can be continued from, and what can be used of it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import folder_paths
import torch

from ...perfusion.concept.concept import Concept
from ...perfusion.concept.concept_file import load_concept, save_concept
from ...perfusion.files.safe_file import TEMPORARY, FileFormatError, replace_file
from ...perfusion.training.results import TrainingResult
from ...perfusion.training.state import TrainingState, load_state, save_state
from ..files.concept_files import FOLDER
from ..files.numbered_files import EXTENSION
from .options import Resume

logger = logging.getLogger("perfusion")

RUNS = "runs"
# A .safetensors file under another name: it is no concept, and menus of concepts list those.
STATE = "training.state"
LOSSES = "losses.csv"
ABOUT = "run.json"


class Run:
    """One run's folder; runs of the same model, pictures, words and settings share it.

    Holds `step_00050.safetensors` and so on (concepts for Load Concept, in full precision),
    `training.state` (the latest, to go on from), `losses.csv`, sample pictures, and `run.json`,
    which says whether the run finished. A disk that refuses is said once and never raised: what
    is learned is still in memory.
    """

    def __init__(self, placeholder: str, fingerprint: str) -> None:
        word = re.sub(r"[^A-Za-z0-9_-]+", "", placeholder) or "concept"
        root = Path(folder_paths.get_folder_paths(FOLDER)[0])
        self.folder = root / RUNS / f"{word}-{fingerprint[:8]}"
        self.fingerprint = fingerprint
        self.problem = ""
        self.saved_step = -1
        self._kept: set[int] = set()

    def start(self, resume: Resume, steps: int) -> TrainingState | None:
        """The state to go on from, or None to start anew; a state not gone on from is kept aside.

        A run that has more than `steps` steps already cannot be continued to them.
        """
        state = None
        try:
            for stale in self.folder.glob(f".*{TEMPORARY}"):
                stale.unlink(missing_ok=True)
            state = self._state()
            if state is not None and not self._goes_on(state, resume, steps):
                self._aside(f"training-{state.step:05}.state")
                state = None
            self._say(steps, finished=False)
        except OSError as error:
            self._refused(error)
        return state

    def save(self, concept: Concept, result: TrainingResult) -> bool:
        """Keep a concept, the losses, and last the state; whether the disk took all of it."""
        try:
            self._keep(concept, result.steps)
            replace_file(self.folder / LOSSES, result.record.csv().encode())
            save_state(result.state, self.folder / STATE)
        except OSError as error:
            self._refused(error)
            return False
        self.saved_step = result.steps
        return True

    def keep(self, concept: Concept, step: int) -> None:
        """Keep the concept of a step, unless it is there already."""
        try:
            self._keep(concept, step)
        except OSError as error:
            self._refused(error)

    def keep_file(self, name: str, content: bytes) -> None:
        """Keep any other file in the folder."""
        try:
            replace_file(self.folder / name, content)
        except OSError as error:
            self._refused(error)

    def other_file(self, name: str) -> bytes | None:
        """What `keep_file` kept, None when there is nothing that can be read."""
        try:
            return (self.folder / name).read_bytes()
        except OSError:
            return None

    def finish(self, steps: int) -> None:
        """Say in the folder that the run came to its end."""
        try:
            self._say(steps, finished=True)
        except OSError as error:
            self._refused(error)

    def concept(self, step: int) -> Concept | None:
        """The concept that was kept of a step, None when there is none that can be read."""
        path = self.file(step)
        if not path.is_file():
            return None
        try:
            return load_concept(path)
        except FileFormatError as error:
            logger.warning("%s", error)
            return None

    def file(self, step: int) -> Path:
        """Where the concept of a step is kept."""
        return self.folder / f"step_{step:05}{EXTENSION}"

    def _keep(self, concept: Concept, step: int) -> None:
        if step not in self._kept:
            # Full precision: it can hold whatever went wrong, and what is read is what was kept.
            save_concept(concept, self.file(step), torch.float32)
            self._kept.add(step)

    def _state(self) -> TrainingState | None:
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            state = load_state(path)
            if state.fingerprint == self.fingerprint:
                return state
            why = f"{path} belongs to another training"
        except FileFormatError as error:
            why = str(error)
        number = 1
        while (self.folder / f"training-damaged-{number}.state").exists():
            number += 1
        kept = self._aside(f"training-damaged-{number}.state")
        logger.warning(
            "%s; training starts anew instead of going on from it, and it is kept as %s", why, kept
        )
        return None

    def _goes_on(self, state: TrainingState, resume: Resume, steps: int) -> bool:
        if state.step > steps:
            logger.info(
                "the training in %s has %d steps already and %d were asked for; it starts anew",
                *(self.folder, state.step, steps),
            )
            return False
        finished = self._about().get("finished") is True
        return resume == "always" or (resume == "unfinished" and not finished)

    def _aside(self, name: str) -> Path:
        kept = self.folder / name
        (self.folder / STATE).replace(kept)
        return kept

    def _about(self) -> dict[str, object]:
        """What `run.json` says; nothing when it is missing or spoiled, as after a crash."""
        try:
            about = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return about if isinstance(about, dict) else {}

    def _say(self, steps: int, finished: bool) -> None:
        about = {"fingerprint": self.fingerprint, "steps": steps, "finished": finished}
        replace_file(self.folder / ABOUT, f"{json.dumps(about, indent=2)}\n".encode())

    def _refused(self, error: OSError) -> None:
        text = (
            f"{self.folder}: the training's files could not be written ({error.strerror or error});"
            " make room on the disk, or make the folder writable"
        )
        if text != self.problem:
            logger.error("%s", text)
        self.problem = text
