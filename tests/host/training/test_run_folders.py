"""What trainings leave on disk is seen, counted, and made less without losing what can go on."""

from __future__ import annotations

import json

import folder_paths
import pytest
from comfyui_perfusion.host.files.concept_files import FOLDER
from comfyui_perfusion.host.training.run_folders import (
    delete,
    evenly_spaced,
    run_folders,
    thin_out,
    thin_run,
)
from comfyui_perfusion.nodes.training_runs import PerfusionTrainingRuns


@pytest.fixture
def root(tmp_path, monkeypatch):
    paths = folder_paths.folder_names_and_paths[FOLDER]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, ([str(tmp_path)], paths[1]))
    return tmp_path / "runs"


def make_run(root, name, steps, finished):
    folder = root / name
    folder.mkdir(parents=True)
    for step in steps:
        (folder / f"step_{step:05}.safetensors").write_bytes(b"c" * 1000)
        (folder / f"sample_{step:05}.png").write_bytes(b"p" * 500)
    (folder / "training.state").write_bytes(b"s" * 300)
    (folder / "run.json").write_text(json.dumps({"finished": finished}))
    return folder


def test_runs_are_listed_by_size_with_what_they_hold(root):
    make_run(root, "small-1", [50], True)
    make_run(root, "large-2", range(50, 550, 50), False)
    (root / "a stranger's folder").mkdir()
    large, small = run_folders()
    assert (large.path.name, large.steps[-1], large.finished) == ("large-2", 500, False)
    assert large.size == sum(file.stat().st_size for file in large.path.iterdir())
    assert small.line.endswith("1 concept up to step 50, finished")


def test_thinning_keeps_the_last_spread_ones_and_what_goes_on(root):
    folder = make_run(root, "cat-1", range(50, 550, 50), False)
    (run,) = run_folders()
    freed = thin_out(run, 3)
    steps = sorted(int(file.stem[5:]) for file in folder.glob("step_*"))
    assert len(steps) == 3
    assert steps[-1] == 500
    assert sorted(int(file.stem[7:]) for file in folder.glob("sample_*")) == steps
    assert freed == 7 * 1500
    assert (folder / "training.state").exists()


@pytest.mark.parametrize("most", range(1, 12))
def test_evenly_spaced_steps_hold_the_last_and_are_never_too_many(most):
    steps = list(range(10, 110, 10))
    kept = evenly_spaced(steps, most)
    assert len(kept) == min(most, len(steps))
    assert 100 in kept
    assert kept <= set(steps)


def test_a_finished_run_can_be_deleted_and_one_that_can_go_on_cannot(root):
    folder = make_run(root, "done-1", [50], True)
    other = make_run(root, "cut-2", [50, 100], False)
    unfinished, finished = run_folders()
    delete(finished)
    assert not folder.exists()
    with pytest.raises(ValueError, match="can go on"):
        delete(unfinished)
    assert other.exists()


def test_a_run_that_finishes_keeps_at_most_ten_concepts(root):
    folder = make_run(root, "long-1", range(10, 310, 10), True)
    thin_run(folder)
    assert len(list(folder.glob("step_*"))) == 10
    assert (folder / "step_00300.safetensors").exists()


def test_the_node_reports_and_acts_on_the_runs_that_are_meant(root):
    make_run(root, "cat-1", [50, 100, 150, 200], True)
    make_run(root, "dog-2", [50, 100], True)
    report = PerfusionTrainingRuns.execute("show", 1, "").args[0]
    assert report.splitlines()[-1].startswith("2 runs")
    PerfusionTrainingRuns.execute("thin out", 1, "cat")
    assert len(list((root / "cat-1").glob("step_*"))) == 1
    assert len(list((root / "dog-2").glob("step_*"))) == 2
    PerfusionTrainingRuns.execute("delete finished", 1, "dog")
    assert [run.path.name for run in run_folders()] == ["cat-1"]
