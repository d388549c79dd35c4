"""A training that is cut off anywhere loses nothing, and goes on to the very same result."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter

import comfy.model_management
import comfy.utils
import pytest
import torch
from comfy.clip_model import CLIPAttention
from comfy.ldm.modules.attention import CrossAttention
from comfyui_perfusion.host.runs import STATE
from comfyui_perfusion.perfusion import load_concept, load_state
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.host.small_training import STEPS, SmallTraining, run_folder, use_folder

Interrupt = comfy.model_management.InterruptProcessingException
INTERRUPTS = 100
FINAL = f"step_{STEPS:05}.safetensors"
# Where a training is cut off: inside the text encoder, the model, its backward pass (where
# checkpointed blocks run again) or a sample; when progress is told between steps; while a file
# is being written.
PLACES = ("text", "model", "backward", "sample", "progress", "file")


class Failure(RuntimeError):
    """An error that training does not know."""


class Tripwire:
    """Counts the moments at each place, and cuts the training off at a chosen one."""

    def __init__(self, monkeypatch) -> None:
        self.counts: Counter[str] = Counter()
        self.done = 0
        self._at: tuple[str, int] | None = None
        self._failing = False
        sync = os.fsync
        monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", self._progress)
        monkeypatch.setattr("os.fsync", lambda file: (self._pass("file"), sync(file)))
        self._hooks = [
            register_module_forward_pre_hook(self._module),
            register_optimizer_step_post_hook(self._step),
        ]

    def arm(self, place: str, moment: int, failing: bool = False) -> None:
        """Cut off at this moment from now, counted from 1, with an interrupt or an error."""
        self.counts.clear()
        self._at, self._failing = (place, moment), failing

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _step(self, *_) -> None:
        self.done += 1

    def _module(self, module, _) -> None:
        if not isinstance(module, CLIPAttention | CrossAttention):
            return
        if not comfy.model_management.in_training:
            self._pass("sample")
        elif torch._C._current_graph_task_id() >= 0:
            self._pass("backward")
        else:
            self._pass("text" if isinstance(module, CLIPAttention) else "model")

    def _progress(self, *_, **__) -> None:
        self._pass("progress")

    def _pass(self, place: str) -> None:
        self.counts[place] += 1
        if self._at != (place, self.counts[place]):
            return
        self._at = None
        if self._failing:
            raise Failure
        if place in ("text", "model", "sample"):
            # As the button does: whichever operation comes next notices it.
            comfy.model_management.interrupt_current_processing()
        else:
            raise Interrupt


@pytest.fixture
def tripwire(monkeypatch):
    found = Tripwire(monkeypatch)
    yield found
    found.remove()


def test_of_a_hundred_interrupts_none_loses_a_step_and_all_end_in_the_same_files(
    tmp_path, monkeypatch, tripwire
):
    use_folder(monkeypatch, tmp_path)
    small = SmallTraining(monkeypatch)
    small.run_session()
    folder = run_folder(tmp_path)
    moments = dict(tripwire.counts)
    expected = {name: (folder / name).read_bytes() for name in (FINAL, STATE)}
    shutil.rmtree(folder)
    chance = random.Random(0)
    cut, finished, tripwire.done = Counter(), 0, 0
    while sum(cut.values()) < INTERRUPTS:
        place = PLACES[sum(cut.values()) % len(PLACES)]
        left = moments[place] * (STEPS - tripwire.done) // STEPS
        tripwire.arm(place, chance.randint(1, left + 1), failing=chance.random() < 0.2)
        try:
            small.run_session()
        except (Interrupt, Failure):
            cut[place] += 1
            if tripwire.done:
                assert load_state(folder / STATE).step == tripwire.done
                concept = load_concept(folder / f"step_{tripwire.done:05}.safetensors")
                assert concept.placeholder == "<bo>"
        else:
            finished, tripwire.done = finished + 1, 0
            assert {name: (folder / name).read_bytes() for name in expected} == expected
            shutil.rmtree(folder)
        assert small.is_untouched()
        assert not list(folder.glob(".*"))
    assert set(cut) == set(PLACES)
    assert finished >= 10
