"""Template 1's training in a real server, in one go or cut off at any moment and run again."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dev.client import Prompt
from dev.server import Server

TEMPLATE = Path(__file__).parent.parent / "workflows" / "api" / "01 train a concept.json"
ENDED, CUT_OFF = "execution_success", "execution_interrupted"


@dataclass(frozen=True)
class Moment:
    """When a training is cut off.

    Attributes:
        step: after the training node told of this one; 0 for when the node began.
        delay: seconds later.
    """

    step: int
    delay: float


@dataclass(frozen=True)
class Ended:
    """How a run of the prompt went.

    Attributes:
        status: the server's last word on it.
        told: the steps it told of, in order.
    """

    status: str
    told: list[int]


class ServerTraining:
    """The same training again and again; the server must keep no outputs (`--cache-none`)."""

    def __init__(self, server: Server, steps: int, sample_every: int = 50) -> None:
        self.server = server
        self.steps = steps
        found: Prompt = json.loads(TEMPLATE.read_text(encoding="utf-8"))
        self.prompt = {k: v for k, v in found.items() if v["class_type"].startswith("Perfusion")}
        (self.node,) = (
            k for k, v in self.prompt.items() if v["class_type"] == "PerfusionTrainConcept"
        )
        self.prompt[self.node]["inputs"].update(steps=steps, options=["options", 0])
        options = {"class_type": "PerfusionTrainingOptions", "inputs": {}}
        self.prompt["options"] = options | {"inputs": {"sample_every": sample_every}}

    def run(self, cut: Moment | None = None) -> Ended:
        """Run the prompt to its end, or interrupt it at a moment.

        Raises:
            RuntimeError: when it fails.
        """
        told: list[int] = []
        timers: list[threading.Timer] = []

        def on_event(kind: str, data: dict[str, Any]) -> None:
            if kind == "executing" and data.get("node") == self.node:
                reached = 0
            elif kind == "progress" and data["node"] == self.node and data["max"] == self.steps:
                reached = data["value"]
                told.append(reached)
            else:
                return
            if cut is not None and not timers and reached >= cut.step:
                body = {"prompt_id": data["prompt_id"]}
                ask = threading.Timer(cut.delay, self.server.client.fetch, ["/interrupt", body])
                timers.append(ask)
                ask.start()

        run = self.server.client.run(self.prompt, on_event)
        for timer in timers:
            timer.cancel()
            timer.join()
        if run.status not in (ENDED, CUT_OFF):
            raise RuntimeError(run.error or run.status)
        return Ended(run.status, told)

    def in_one_go(self) -> None:
        """Run the prompt from the first step to the last.

        Raises:
            RuntimeError: when it does not.
        """
        ended = self.run()
        if ended.status != ENDED or ended.told[0] > 1:
            raise RuntimeError(f"expected every step to run, found {ended}")

    def cut_off(self, moment: Moment) -> list[int]:
        """Interrupt the prompt, run it again to its end; the steps told of by both runs.

        Raises:
            RuntimeError: when it was not interrupted, or does not go on from where it was.
        """
        first, second = self.run(moment), self.run()
        if (first.status, second.status) != (CUT_OFF, ENDED):
            raise RuntimeError(f"{moment}: expected a cut and an end, found {first}, {second}")
        return first.told + second.told

    def digest(self) -> str:
        """Of the concept's last step in full precision and of every loss on the way there."""
        (folder,) = (self.server.base / "models" / "perfusion" / "runs").iterdir()
        names = (f"step_{self.steps:05}.safetensors", "losses.csv")
        return hashlib.sha256(b"".join((folder / n).read_bytes() for n in names)).hexdigest()

    def moments(self, count: int, seed: int, seconds_per_step: float) -> list[Moment]:
        """Moments at random steps, somewhere within the step."""
        chance = random.Random(seed)
        return [
            Moment(chance.randrange(self.steps - 5), chance.random() * seconds_per_step)
            for _ in range(count)
        ]
