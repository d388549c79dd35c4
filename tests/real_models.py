"""What the templates for real checkpoints need on a machine that has none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from dev.client import Prompt
from dev.server import Server

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
SDXL = "sd_xl_base_1.0.safetensors"
TRAIN = "09 train on your photos (SD 1.5)"
TRAIN_SDXL = "10 train on your photos (SDXL)"
USE = "11 use your concept"
# The built-in ones are two thousand, which take this text encoder many minutes on a CPU.
CAPTIONS = "\n".join(
    f"a photo of a {thing} in the {place}"
    for thing in ("cat", "dog", "cup")
    for place in ("snow", "park", "city")
)


def prepare(server: Server) -> None:
    """A checkpoint with random weights, and photos of several sizes as files."""
    checkpoint = server.base / "models" / "checkpoints" / CHECKPOINT
    if not checkpoint.exists():
        command = [sys.executable, "-m", "tests.random_checkpoint", str(checkpoint)]
        subprocess.run(command, cwd=ROOT, check=True)
    # Named like SDXL and empty: its own text encoder and UNet would be 7 GB of random numbers.
    (checkpoint.parent / SDXL).touch()
    photos = server.base / "input" / "my_cat"
    photos.mkdir(parents=True, exist_ok=True)
    for at in range(4):
        pixels = numpy.random.default_rng(at).integers(0, 255, (96 + 32 * at, 128, 3), "uint8")
        Image.fromarray(pixels).save(photos / f"{at}.jpg")


def small(prompt: Prompt) -> Prompt:
    """The same workflow in two steps and at 64x64."""
    changes: dict[str, dict[str, Any]] = {
        "PerfusionTrainConcept": {"steps": 2, "batch_size": 1},
        "PerfusionTrainingOptions": {"resolution": 64, "sample_steps": 2},
        "PerfusionAutoMask": {"resolution": 64, "draws": 1},
        "EmptyLatentImage": {"width": 64, "height": 64},
        "KSampler": {"steps": 2},
    }
    for node in prompt.values():
        node["inputs"].update(changes.get(node["class_type"], {}))
    clip = next(k for k, node in prompt.items() if node["class_type"] == "CheckpointLoaderSimple")
    for node in list(prompt.values()):
        if node["class_type"] == "PerfusionTrainConcept":
            inputs = {"clip": [clip, 1], "captions": CAPTIONS}
            prompt["90"] = {"class_type": "PerfusionCovariance", "inputs": inputs}
            node["inputs"]["covariance"] = ["90", 0]
    return prompt


def read(name: str) -> Prompt:
    """A template in API format."""
    file = ROOT / "workflows" / "api" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def train_once(server: Server) -> None:
    """Leave the concept that the last template uses."""
    if not (server.base / "models" / "perfusion" / "my_cat_00001_.safetensors").exists():
        run = server.client.run(small(read(TRAIN)))
        assert run.status == "execution_success", run.error
