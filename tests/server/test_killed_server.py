"""A server that is killed in the middle of a training loses nothing that was checkpointed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dev.client import Prompt
from dev.comfyui import Host
from dev.prepare import Layout, make_server
from dev.server import Server

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS, EVERY, KILLED_AFTER = 30, 5, 12


@pytest.fixture
def prompt() -> Prompt:
    """The training workflow up to the saved concept, with checkpoints and without samples."""
    file = ROOT / "workflows" / "api" / "01 train a concept.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    kept = {k: v for k, v in found.items() if v["class_type"].startswith("Perfusion")}
    kept[train_node(kept)]["inputs"].update(steps=STEPS, options=["options", 0])
    options = {"sample_every": 0, "checkpoint_every": EVERY}
    kept["options"] = {"class_type": "PerfusionTrainingOptions", "inputs": options}
    return kept


def train_node(prompt: Prompt) -> str:
    return next(k for k, v in prompt.items() if v["class_type"] == "PerfusionTrainConcept")


def steps_of(server: Server, prompt: Prompt, kill_after: int = 0) -> list[int]:
    """The steps that are told while a workflow runs to its end, or until the server is killed."""
    seen: list[int] = []

    def on_event(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data["node"] == train_node(prompt) and data["max"] == STEPS:
            seen.append(data["value"])
            if kill_after and data["value"] >= kill_after and server.process is not None:
                server.process.kill()

    run = server.client.run(prompt, on_event)
    assert run.status == "execution_success", run.error
    return seen


def test_after_a_kill_the_same_workflow_goes_on_from_the_last_checkpoint(
    comfy_host: Host, tmp_path: Path, prompt: Prompt
) -> None:
    server = make_server(comfy_host, Layout(ROOT), tmp_path)
    with server, pytest.raises(ConnectionError):
        steps_of(server, prompt, KILLED_AFTER)
    runs = tmp_path / "models" / "perfusion" / "runs"
    (run,) = runs.iterdir()
    assert json.loads((run / "run.json").read_text())["finished"] is False
    with make_server(comfy_host, Layout(ROOT), tmp_path) as server:
        first = steps_of(server, prompt)[0]
        assert first % EVERY == 1
        assert first > KILLED_AFTER - EVERY
        final = run / f"step_{STEPS:05}.safetensors"
        went_on = final.read_bytes()
        # From the start, in one go: the very same file.
        anew = copy.deepcopy(prompt)
        anew["options"]["inputs"]["resume"] = "never"
        assert steps_of(server, anew)[0] == 1
        assert final.read_bytes() == went_on
