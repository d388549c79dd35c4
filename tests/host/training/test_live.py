"""What a training says of itself while it runs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from comfyui_perfusion.host.training.live import LiveProgress
from comfyui_perfusion.perfusion.training.loss_bands import BandMeans
from comfyui_perfusion.perfusion.training.run import Progress


class Clock:
    """Goes on when told to."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def step(number: int, loss: float = 1.0) -> Progress:
    return Progress(number, loss, BandMeans((0.5, math.nan, 1.5, 2.5)))


def test_the_time_left_is_that_of_the_steps_done_without_the_first():
    clock = Clock()
    live = LiveProgress(10, torch.device("cpu"), clock)
    clock.time = 100.0
    live.on_step(step(1))
    assert live.message(step(1), clock.time)["seconds_left"] is None
    for number in (2, 3):
        clock.time += 2.0
        live.on_step(step(number))
    assert live.message(step(3), clock.time)["seconds_left"] == pytest.approx(2.0 * 7)


def test_a_continued_training_counts_from_where_it_goes_on():
    clock = Clock()
    live = LiveProgress(100, torch.device("cpu"), clock)
    live.on_step(step(91))
    clock.time = 3.0
    live.on_step(step(92))
    assert live.message(step(92), clock.time)["seconds_left"] == pytest.approx(3.0 * 8)


def test_a_message_holds_losses_and_memory_and_is_json():
    live = LiveProgress(10, torch.device("cpu"), Clock())
    live._points = [[1, 0.25, 1.5]]
    message = live.message(step(1, 0.25), 0.0)
    assert json.loads(json.dumps(message)) == message
    assert message["bands"] == [0.5, None, 1.5, 2.5]
    assert message["points"] == [[1, 0.25, 1.5]]
    assert message["memory_gb"] > 0
