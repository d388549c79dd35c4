"""A training that is cut off anywhere loses nothing, and goes on to the very same result."""

from __future__ import annotations

import random
import shutil
from collections import Counter

import comfy.model_management
import pytest
from comfyui_perfusion.host.training.runs import STATE
from comfyui_perfusion.perfusion import load_concept
from comfyui_perfusion.perfusion.training.state import load_state

from tests.host.small_training import STEPS, SmallTraining, Tripwire, run_folder, use_folder

Interrupt = comfy.model_management.InterruptProcessingException
INTERRUPTS = 100
FINAL = f"step_{STEPS:05}.safetensors"
PLACES = ("text", "model", "backward", "sample", "progress", "file")


class Failure(RuntimeError):
    """An error that training does not know."""


class Scissors:
    """Cuts a training off at a chosen moment."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._chosen: tuple[str, int] | None = None
        self._failing = False

    def arm(self, place: str, moment: int, failing: bool) -> None:
        """Cut at this moment from now, counted from 1, with an interrupt or an error."""
        self.counts.clear()
        self._chosen, self._failing = (place, moment), failing

    def __call__(self, place: str) -> None:
        self.counts[place] += 1
        if self._chosen != (place, self.counts[place]):
            return
        self._chosen = None
        if self._failing:
            raise Failure
        if place in ("text", "model", "sample"):
            # As the button does: whichever operation comes next notices it.
            comfy.model_management.interrupt_current_processing()
        else:
            raise Interrupt


@pytest.fixture
def scissors():
    return Scissors()


@pytest.fixture
def tripwire(monkeypatch, scissors):
    found = Tripwire(monkeypatch, scissors)
    yield found
    found.remove()
    comfy.model_management.interrupt_current_processing(False)


def test_of_a_hundred_interrupts_none_loses_a_step_and_all_end_in_the_same_files(
    tmp_path, monkeypatch, tripwire, scissors
):
    use_folder(monkeypatch, tmp_path)
    small = SmallTraining(monkeypatch)
    small.run_session()
    folder = run_folder(tmp_path)
    moments = dict(scissors.counts)
    expected = {name: (folder / name).read_bytes() for name in (FINAL, STATE)}
    shutil.rmtree(folder)
    chance = random.Random(0)
    cut, finished, tripwire.steps = Counter(), 0, 0
    while sum(cut.values()) < INTERRUPTS:
        place = PLACES[sum(cut.values()) % len(PLACES)]
        left = moments[place] * (STEPS - tripwire.steps) // STEPS
        scissors.arm(place, chance.randint(1, left + 1), failing=chance.random() < 0.2)
        try:
            small.run_session()
        except (Interrupt, Failure):
            cut[place] += 1
            if tripwire.steps:
                assert load_state(folder / STATE).step == tripwire.steps
                concept = load_concept(folder / f"step_{tripwire.steps:05}.safetensors")
                assert concept.placeholder == "<bo>"
        else:
            finished, tripwire.steps = finished + 1, 0
            assert {name: (folder / name).read_bytes() for name in expected} == expected
            shutil.rmtree(folder)
        assert small.is_untouched()
        assert not list(folder.glob(".*"))
    assert set(cut) == set(PLACES)
    assert finished >= 10
