"""A training that is interrupted keeps what was learned, goes on from it, and harms nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dev.client import Client
from dev.server import Server

ROOT = Path(__file__).resolve().parent.parent.parent


def test_an_interrupted_training_leaves_a_usable_concept_and_is_continued(
    client: Client, comfy_server: Server
) -> None:
    api = ROOT / "workflows" / "api"
    prompt = json.loads((api / "01 train a concept.json").read_text(encoding="utf-8"))
    train = next(k for k, v in prompt.items() if v["class_type"] == "PerfusionTrainConcept")
    prompt[train]["inputs"].update(steps=400, seed=12345, options=["options", 0])
    # With this schedule a step does not depend on how many there will be.
    options = {"schedule": "constant"}
    prompt["options"] = {"class_type": "PerfusionTrainingOptions", "inputs": options}
    folder = comfy_server.base / "models" / "perfusion"
    before = set(folder.rglob("*.safetensors"))
    seen: list[int] = []

    def interrupt(kind: str, data: dict[str, Any]) -> None:
        # While the covariance is measured, which comes first, there are other numbers.
        if kind != "progress" or data["node"] != train:
            return
        if data["max"] == prompt[train]["inputs"]["steps"]:
            seen.append(data["value"])
            if data["value"] >= 3 and data["max"] == 400:
                client.fetch("/interrupt", {"prompt_id": data["prompt_id"]})

    run = client.run(prompt, interrupt)
    assert run.status == "execution_interrupted", run.error
    assert seen[-1] < 400
    partial = set(folder.rglob("*.safetensors")) - before
    assert len(partial) == 1
    done = int(next(iter(partial)).stem.removeprefix("step_"))
    assert done >= 3

    use = json.loads((api / "02 use a concept.json").read_text(encoding="utf-8"))
    for node in use.values():
        if node["class_type"] == "PerfusionLoadConcept":
            node["inputs"]["concept_name"] = partial.pop().relative_to(folder).as_posix()
    again = client.run(use)
    assert again.status == "execution_success", again.error
    assert len(again.images()) == 1

    prompt[train]["inputs"]["steps"] = done + 2
    seen.clear()
    went_on = client.run(prompt, interrupt)
    assert went_on.status == "execution_success", went_on.error
    assert seen[0] >= done
    assert f"continuing from step {done}" in comfy_server.log.read_text("utf-8")
    (text,) = went_on.outputs[train]["text"]
    assert f"{done + 2} steps (continued from step {done})" in text
