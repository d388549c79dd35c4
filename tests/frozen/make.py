"""Makes the files of this folder. It runs in the version they are to be those of, not in today's.

git worktree add ../frozen 4204947                # with the environment of dev.py beside it
mkdir ../frozen/tests/frozen
cp tests/frozen/*.py ../frozen/tests/frozen/
cd ../frozen && python -m pytest tests/frozen/make.py
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from comfyui_perfusion.perfusion import load_concept, save_concept, save_covariance

from tests.frozen.scenes import PLACEHOLDERS, SCENES, Training, latents
from tests.host.conftest import Worlds
from tests.host.small_training import SmallTraining, run_folder, use_folder

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SEEDS = {"locked": 0, "trained": 1, "sdxl": 2, "second": 3}


def fresh(name):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def test_freeze_concepts_and_latents():
    worlds = Worlds()
    folder = fresh("concepts")
    for file in (ROOT / "demo" / "concepts").glob("*.safetensors"):
        shutil.copy(file, folder)
    concepts = {}
    for name, seed in SEEDS.items():
        family = "sdxl_light" if name == "sdxl" else "sd1_light"
        concept = worlds.concept(family, seed, PLACEHOLDERS[name])
        if name == "trained":
            generator = torch.Generator().manual_seed(seed)
            keys = {k: torch.randn(v.shape, generator=generator) for k, v in concept.o_v.items()}
            concept = replace(concept, o_k=keys)
        path = save_concept(concept, folder / f"{name}.safetensors")
        concepts[name] = load_concept(path)
    again = fresh("concepts_again")
    for file in folder.iterdir():
        save_concept(load_concept(file), again / file.name)
    found = {name: latents(worlds, concepts, name).contiguous() for name in SCENES}
    safetensors.torch.save_file(found, HERE / "latents.safetensors")


def test_freeze_a_training(monkeypatch, tmp_path):
    folder = fresh("training")
    training = Training(Worlds())
    use_folder(monkeypatch, tmp_path)
    training.run()
    shutil.copy(run_folder(tmp_path) / "step_00004.safetensors", folder)
    shutil.rmtree(tmp_path / "runs")
    training.run(2)
    for name in ("training.state", "step_00002.safetensors"):
        shutil.copy(run_folder(tmp_path) / name, folder)


def test_freeze_a_covariance(monkeypatch):
    save_covariance(SmallTraining(monkeypatch).covariance, HERE / "covariance.safetensors")


def test_freeze_workflows():
    folder = fresh("workflows")
    for file in (ROOT / "workflows" / "api").glob("*.json"):
        shutil.copy(file, folder)
