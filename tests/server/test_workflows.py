"""Every workflow of the pack, run by a real server."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from dev.base import PACK
from dev.client import Client
from dev.server import Server

ROOT = Path(__file__).resolve().parent.parent.parent
WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))
# Those for real checkpoints run in test_real_checkpoints.py.
DEMO = [file for file in WORKFLOWS if "PerfusionDemoModel" in file.read_text(encoding="utf-8")]
TEMPLATES = sorted((ROOT / "workflows").glob("*.json"))


def nodes_of(prompt: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [node for node in prompt.values() if node["class_type"] == kind]


@pytest.mark.parametrize("file", DEMO, ids=lambda file: file.stem)
def test_a_workflow_runs_to_its_pictures(client: Client, comfy_server: Server, file: Path) -> None:
    prompt = json.loads(file.read_text(encoding="utf-8"))
    for node in nodes_of(prompt, "PerfusionTrainConcept"):
        node["inputs"]["steps"] = 3  # that it learns is measured elsewhere
    run = client.run(prompt)
    assert run.status == "execution_success", run.error
    pictures = [Image.open(io.BytesIO(client.picture(image))) for image in run.images("output")]
    assert len(pictures) >= len(nodes_of(prompt, "SaveImage")) > 0
    for picture in pictures:
        low, high = picture.convert("L").getextrema()
        assert high - low > 30, "a picture of one even colour"
    for node in nodes_of(prompt, "PerfusionSaveConcept"):
        folder = comfy_server.base / "models" / "perfusion"
        saved = list(folder.rglob(f"{node['inputs']['filename_prefix']}*.safetensors"))
        assert len(saved) >= 1
        assert saved[0].stat().st_size < 100_000


def test_the_templates_are_served_with_their_thumbnails(client: Client) -> None:
    listed = client.json("/workflow_templates")[PACK]
    assert sorted(listed) == [file.stem for file in TEMPLATES]
    for file in TEMPLATES:
        address = f"/api/workflow_templates/{PACK}/{quote(file.stem)}"
        assert client.json(address + ".json") == json.loads(file.read_text(encoding="utf-8"))
        thumbnail = Image.open(io.BytesIO(client.fetch(address + ".jpg")))
        assert thumbnail.format == "JPEG"


def test_a_workflow_is_there_in_both_formats() -> None:
    api = {file.stem for file in WORKFLOWS}
    assert {file.stem for file in TEMPLATES} == api - {"train_and_use"}
