"""Pictures with captions out of a folder, through ComfyUI's own dataset node."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dev.client import Client, Prompt
from dev.server import Server

ROOT = Path(__file__).resolve().parent.parent.parent
CAPTIONS = ("a photo of a <bo> on the beach", "a <bo> in the snow")


@pytest.fixture
def prompt(comfy_server: Server) -> Prompt:
    """The training workflow with pictures of two sizes and their captions from a folder."""
    folder = comfy_server.base / "input" / "my_things"
    folder.mkdir(parents=True, exist_ok=True)
    for number, (size, caption) in enumerate(zip(((48, 48), (96, 48)), CAPTIONS, strict=True)):
        Image.linear_gradient("L").resize(size).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    file = ROOT / "workflows" / "api" / "01 train a concept.json"
    found: Prompt = json.loads(file.read_text(encoding="utf-8"))
    kinds = ("PerfusionDemoModel", "PerfusionTrainConcept", "PerfusionSaveConcept")
    kept = {k: v for k, v in found.items() if v["class_type"] in kinds}
    kept["folder"] = {
        "class_type": "LoadImageTextDataSetFromFolder",
        "inputs": {"folder": "my_things"},
    }
    inputs = train_inputs(kept)
    inputs.update(steps=2, images=["folder", 0], captions=["folder", 1])
    del inputs["mask"]
    return kept


def train_inputs(prompt: Prompt) -> dict[str, object]:
    return next(v for v in prompt.values() if v["class_type"] == "PerfusionTrainConcept")["inputs"]


def test_pictures_of_two_sizes_are_trained_on_with_their_captions(
    client: Client, prompt: Prompt
) -> None:
    run = client.run(prompt)
    assert run.status == "execution_success", run.error
    assert any("2 steps" in text for each in run.outputs.values() for text in each.get("text", []))


def test_a_caption_without_the_placeholder_is_named(client: Client, prompt: Prompt) -> None:
    train_inputs(prompt)["placeholder"] = "<other>"
    run = client.run(prompt)
    assert run.status == "execution_error"
    assert "expected the placeholder <other> once" in run.error
