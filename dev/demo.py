"""`python dev.py demo`: trains a concept in a real ComfyUI and shows what it learned."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from .client import Client, Prompt, Run
from .comfyui import Host
from .prepare import Layout, make_server, prepare
from .report import Failure, progress, say
from .threads import PATIENT

WORKFLOW = Path("workflows") / "api" / "train_and_use.json"
PAINTERS = ("KSampler", "VAEDecode")  # what a picture's time is made of


def demo(layout: Layout, output: Path) -> int:
    """Set up, run the workflow, save pictures and figures; returns the exit status."""
    host = prepare(layout)
    prompt: Prompt = json.loads((layout.root / WORKFLOW).read_text(encoding="utf-8"))
    output.mkdir(parents=True, exist_ok=True)
    say("Starting ComfyUI")
    with make_server(host, layout) as server:
        say(f"Running {WORKFLOW.as_posix()} in it")
        run = run_workflow(server.client, prompt)
        pictures = save_pictures(server.client, run, output)
    for picture in pictures:
        say(f"Picture: {picture}")
    (output / "run.json").write_text(
        json.dumps(summary(prompt, run, pictures), indent=2), encoding="utf-8"
    )
    return measure(host, layout, output, saved_concept(prompt, run, server.base), steps_of(prompt))


def run_workflow(client: Client, prompt: Prompt) -> Run:
    """Run a workflow with its nodes' progress shown.

    Raises:
        Failure: with the node and its message when it did not succeed.
    """
    titles = {key: title(node) for key, node in prompt.items()}

    def show(kind: str, data: dict[str, Any]) -> None:
        node = str(data.get("node"))
        if kind == "executing" and node in titles:
            say(f"   {titles[node]}")
        elif kind == "progress":
            progress(f"   {titles.get(node, node)}: {data['value']} of {data['max']}")

    run = client.run(prompt, show)
    if run.status != "execution_success":
        raise Failure(f"The workflow stopped ({run.status}): {run.error or 'interrupted'}")
    return run


def title(node: dict[str, Any]) -> str:
    """How a node is called in what is shown."""
    return node.get("_meta", {}).get("title") or node["class_type"]


def save_pictures(client: Client, run: Run, output: Path) -> list[Path]:
    """Copy the pictures a run saved into `output`."""
    references = run.images("output")
    if not references:
        raise Failure("The workflow succeeded but saved no picture.")
    pictures = []
    for reference in references:
        picture = output / reference["filename"]
        picture.write_bytes(client.picture(reference))
        pictures.append(picture)
    return pictures


def summary(prompt: Prompt, run: Run, pictures: list[Path]) -> dict[str, Any]:
    """What `demo.measure` needs to know of the run; times are in seconds."""
    by_class: dict[str, float] = {}
    for node, seconds in run.seconds.items():
        if node in prompt:
            kind = prompt[node]["class_type"]
            by_class[kind] = by_class.get(kind, 0.0) + seconds
    samplers = sum(node["class_type"] == "KSampler" for node in prompt.values())
    painting = sum(by_class.get(kind, 0.0) for kind in PAINTERS)
    return {
        "train_seconds": by_class.get("PerfusionTrainConcept"),
        "image_seconds": painting / samplers if samplers else None,
        "seconds_by_class": by_class,
        "outputs": run.outputs,
        "pictures": [str(picture) for picture in pictures],
    }


def saved_concept(prompt: Prompt, run: Run, base: Path) -> Path:
    """The concept file that the run's save node reports ("name (size), placeholder ...")."""
    for node, shown in run.outputs.items():
        if node in prompt and prompt[node]["class_type"] == "PerfusionSaveConcept":
            name = shown["text"][0].split(" (")[0]
            return base / "models" / "perfusion" / name
    raise Failure("The workflow succeeded but saved no concept.")


def steps_of(prompt: Prompt) -> int:
    """How many training steps the workflow takes."""
    trainers = [v for v in prompt.values() if v["class_type"] == "PerfusionTrainConcept"]
    return trainers[0]["inputs"]["steps"]


def measure(host: Host, layout: Layout, output: Path, concept: Path, steps: int) -> int:
    """Let the small world's judge measure: prints its table and writes figures.json."""
    say("Measuring (trains two more concepts for comparison)")
    command = [str(host.python), "-m", "demo.measure", "--output", str(output)]
    command += ["--concept", str(concept), "--steps", str(steps)]
    environment = {**PATIENT, **os.environ, "COMFYUI_PATH": str(host.comfyui)}
    status = subprocess.run(command, cwd=layout.root, env=environment).returncode
    if status != 0:
        raise Failure(f"demo.measure failed with status {status}; what it printed is above.")
    say(f"Pictures and figures.json are in {output}")
    return 0
