"""What a training keeps on disk, and what becomes of a disk that keeps nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfyui_perfusion.host.training.runs import STATE, Run
from comfyui_perfusion.perfusion import load_concept
from comfyui_perfusion.perfusion.training.state import load_state
from PIL import Image

from tests.host.small_training import STEPS, SmallTraining, Tripwire, run_folder, use_folder

Interrupt = comfy.model_management.InterruptProcessingException
FINAL = f"step_{STEPS:05}.safetensors"


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        yield SmallTraining(patch)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    use_folder(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture
def cut_off(small, monkeypatch):
    """Trains until a number of steps is done, and is interrupted then."""

    def train(steps, also=lambda: None, **options):
        def at(place):
            if place == "model" and tripwire.steps == steps:
                also()
                raise Interrupt

        with monkeypatch.context() as patch:
            tripwire = Tripwire(patch, at)
            try:
                with pytest.raises(Interrupt):
                    small.run(**options)
            finally:
                tripwire.remove()

    return train


def about(run):
    return json.loads((run / "run.json").read_text())


def test_a_finished_run_has_concepts_pictures_losses_and_a_state(small, folder):
    small.run()
    run = run_folder(folder)
    assert run.name.startswith("bo-")
    assert {path.name for path in run.iterdir()} == {
        *("step_00002.safetensors", "step_00004.safetensors", "training.state"),
        *("sample_00000.png", "sample_00002.png", "sample_00004.png", "losses.csv", "run.json"),
    }
    assert about(run)["finished"] is True
    assert load_concept(run / FINAL).placeholder == "<bo>"
    assert load_state(run / STATE).step == STEPS
    with Image.open(run / "sample_00004.png") as picture:
        assert picture.size == (64, 64)


def test_the_same_training_gives_the_same_files_byte_for_byte(small, folder):
    small.run()
    run = run_folder(folder)
    first = {path.name: path.read_bytes() for path in run.iterdir()}
    shutil.rmtree(run)
    small.run()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == first


def test_a_run_that_was_cut_off_is_continued_and_says_so(small, folder, cut_off, caplog):
    cut_off(3)
    run = run_folder(folder)
    assert about(run)["finished"] is False
    with caplog.at_level(logging.INFO, "perfusion"):
        trained = small.run()
    assert f"continuing from step 3 of {STEPS}" in caplog.text
    assert "continued from step 3" in trained.report
    assert trained.result.steps == STEPS
    assert len(trained.result.losses) == STEPS


def test_a_finished_run_is_made_longer_only_when_asked_for(small, folder):
    small.run({"steps": 2})
    assert "continued" not in small.run({"steps": 3}).report
    longer = small.run({"steps": STEPS}, resume="always")
    assert "continued from step 3" in longer.report
    run = run_folder(folder)
    (made_longer, at_once) = (run / FINAL).read_bytes(), small.run(resume="never")
    assert at_once.result.steps == STEPS
    assert (run / FINAL).read_bytes() == made_longer


def test_a_run_is_not_shortened_and_what_it_had_is_kept(small, folder, cut_off, caplog):
    cut_off(3)
    with caplog.at_level(logging.INFO, "perfusion"):
        shorter = small.run({"steps": 2})
    assert shorter.result.steps == 2
    assert "has 3 steps already and 2 were asked for" in caplog.text
    assert load_state(run_folder(folder) / "training-00003.state").step == 3


def test_never_resuming_starts_anew_and_keeps_the_old_state(small, folder, cut_off):
    cut_off(2)
    assert "continued" not in small.run(resume="never").report
    assert load_state(run_folder(folder) / "training-00002.state").step == 2


def cut_short(state):
    state.write_bytes(state.read_bytes()[:-7])


def empty(state):
    state.write_bytes(b"")


def of_another_run(state):
    other = Run("<bo>", "0" * 64).folder / STATE
    text = state.read_bytes().replace(load_state(state).fingerprint.encode(), b"0" * 64)
    other.parent.mkdir(parents=True)
    other.write_bytes(text)
    other.replace(state)
    other.parent.rmdir()


@pytest.mark.parametrize("spoil", [cut_short, empty, of_another_run])
def test_a_state_that_cannot_be_used_is_kept_aside_with_a_warning(
    small, folder, cut_off, caplog, spoil
):
    cut_off(3)
    run = run_folder(folder)
    spoil(run / STATE)
    spoiled = (run / STATE).read_bytes()
    trained = small.run()
    assert trained.result.steps == STEPS
    assert "continued" not in trained.report
    assert "training starts anew" in caplog.text
    assert (run / "training-damaged-1.state").read_bytes() == spoiled
    assert load_state(run / STATE).step == STEPS


def test_a_killed_process_leaves_files_half_written_which_the_next_run_removes(small, folder):
    small.run({"steps": 1})
    run = run_folder(folder)
    (run / ".training.state.0123456789ab.tmp").write_bytes(b"half")
    (run / "run.json").write_bytes(b'{"fin')
    assert small.run().result.steps == STEPS
    assert not list(run.glob(".*"))


def test_other_settings_have_a_folder_of_their_own(small, folder):
    small.run({"steps": 1})
    small.run({"steps": 1, "seed": 1})
    small.run({"steps": 1}, background=0.5)
    assert len(list((folder / "runs").iterdir())) == 3


def test_a_folder_that_cannot_be_written_costs_the_files_but_not_the_concept(small, folder, caplog):
    (folder / "runs").write_bytes(b"a file where a folder is needed")
    trained = small.run()
    assert trained.result.steps == STEPS
    assert "could not be written" in trained.report
    assert "training goes on without a checkpoint" in caplog.text
    assert small.is_untouched()


@pytest.fixture
def small_disk(folder):
    """A file system of 200 kB, where the concepts are."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if os.name == "nt" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def test_a_full_disk_costs_the_files_but_not_the_concept(small, small_disk, caplog):
    fill(small_disk)
    trained = small.run()
    assert trained.result.steps == STEPS
    assert "No space left on device" in trained.report
    assert "training goes on without a checkpoint" in caplog.text
    assert not list(small_disk.rglob("*.safetensors"))
    (small_disk / "filler").unlink()
    assert small.run().report.count("No space left") == 0
    assert load_state(run_folder(small_disk) / STATE).step == STEPS


def test_a_disk_that_fills_up_loses_nothing_that_was_on_it(small, small_disk, cut_off, caplog):
    whole = small.run().concept
    shutil.rmtree(run_folder(small_disk))
    cut_off(3, also=lambda: fill(small_disk))
    assert "what 3 steps learned is lost" in caplog.text
    assert "make room on the disk" in caplog.text
    run = run_folder(small_disk)
    # The checkpoint of step 2 is as it was.
    assert load_state(run / STATE).step == 2
    (small_disk / "filler").unlink()
    again = small.run()
    assert "continued from step 2" in again.report
    name = next(iter(whole.o_v))
    assert torch.equal(again.concept.o_v[name], whole.o_v[name])


def test_with_a_schedule_over_the_steps_a_run_of_another_length_is_another_run(small, folder):
    small.run({"steps": 1}, schedule="cosine")
    longer = small.run({"steps": 2}, schedule="cosine", resume="always")
    assert "continued" not in longer.report
    assert len(list((folder / "runs").iterdir())) == 2
