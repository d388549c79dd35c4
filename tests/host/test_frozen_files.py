"""Files of an earlier version: they load, are written again as they were, and draw what they drew.

How they were made: tests/frozen/README.md.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from comfyui_perfusion.perfusion import load_concept, load_covariance, save_concept, save_covariance
from comfyui_perfusion.perfusion.training.state import load_state, save_state

from tests.frozen.scenes import SCENES, Training, latents
from tests.host.small_training import run_folder, use_folder

FROZEN = Path(__file__).resolve().parent.parent / "frozen"
CONCEPTS = sorted((FROZEN / "concepts").glob("*.safetensors"))
TRAINING = FROZEN / "training"
# Half of fp32's digits: what is left after thousands of sums that each machine orders its own way.
HALF_THE_DIGITS = torch.finfo(torch.float32).eps ** 0.5
# Any other concept, lock or schedule changes at least this part of the picture.
VISIBLE = 0.01


def by_name(file):
    return file.stem


def distance(found, expected):
    """How far apart, as a part of what is expected."""
    return float((found - expected).double().norm() / expected.double().norm())


@pytest.fixture(scope="module")
def frozen_latents():
    return safetensors.torch.load_file(FROZEN / "latents.safetensors")


@pytest.fixture(scope="module")
def concepts():
    return {file.stem: load_concept(file) for file in CONCEPTS}


def content(file):
    """Energy, other metadata and the bytes of the tensors of a concept file."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    (energy,) = json.loads(header["__metadata__"].pop("energy"))
    return energy, header, data[start:]


def assert_same_content(found, expected):
    """Everything to the byte but the energy, a sum over numbers that a concept holds in fp32."""
    (energy, *rest), (expected_energy, *expected_rest) = content(found), content(expected)
    assert rest == expected_rest
    assert energy == pytest.approx(expected_energy, rel=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("file", CONCEPTS, ids=by_name)
def test_a_concept_file_is_written_again_as_it_was_then(file, tmp_path):
    again = save_concept(load_concept(file), tmp_path / file.name)
    assert_same_content(again, FROZEN / "concepts_again" / file.name)


@pytest.mark.parametrize("step", [2, 4])
def test_a_concept_kept_while_training_is_written_again_as_it_was(step, tmp_path):
    file = TRAINING / f"step_{step:05}.safetensors"
    again = save_concept(load_concept(file), tmp_path / file.name, torch.float32)
    assert_same_content(again, file)


def test_a_covariance_is_written_again_as_it_was(tmp_path):
    file, again = FROZEN / "covariance.safetensors", tmp_path / "again.safetensors"
    save_covariance(load_covariance(file), again)
    assert again.read_bytes() == file.read_bytes()


def test_a_training_state_is_written_again_as_it_was(tmp_path):
    file, again = TRAINING / "training.state", tmp_path / "again.state"
    save_state(load_state(file), again)
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", SCENES)
def test_concepts_draw_what_they_drew(worlds, concepts, frozen_latents, name):
    expected = frozen_latents[name]
    assert distance(latents(worlds, concepts, name), expected) < HALF_THE_DIGITS


def test_the_frozen_latents_tell_the_scenes_apart(frozen_latents):
    found = list(frozen_latents.values())
    assert sorted(frozen_latents) == sorted(SCENES)
    for at, one in enumerate(found):
        assert all(distance(one, other) > VISIBLE for other in found[:at])


def test_a_stopped_training_goes_on_to_what_it_became(worlds, tmp_path, monkeypatch):
    use_folder(monkeypatch, tmp_path)
    training = Training(worlds)
    training.run(1)
    run = run_folder(tmp_path)
    # The fingerprint names settings, pictures and weights, and the weights' last bits are the
    # machine's: the old state becomes one of the run that it is here.
    fingerprint = load_state(run / "training.state").fingerprint
    shutil.rmtree(run)
    state = replace(load_state(TRAINING / "training.state"), fingerprint=fingerprint)
    save_state(state, run / "training.state")
    texts = [each for each in training.run() if isinstance(each, str)]
    assert any("continued from step 2" in text for text in texts)
    start, end = (load_concept(TRAINING / f"step_{step:05}.safetensors") for step in (2, 4))
    found = load_concept(run / "step_00004.safetensors")
    assert found.layers == end.layers
    learned = [torch.cat(list(each.o_v.values())) for each in (found, end, start)]
    # Adam divides by its moments, which takes digits: a hundredth of what was learned since.
    assert (learned[0] - learned[1]).norm() < 0.01 * (learned[1] - learned[2]).norm()
    for field in ("i", "u", "superclass_encoding"):
        assert distance(getattr(found, field), getattr(end, field)) < HALF_THE_DIGITS
