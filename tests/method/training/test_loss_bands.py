"""Losses smoothed for each band of timesteps."""

from __future__ import annotations

import csv
import io
import math

import pytest
import torch

from perfusion.training.loss_bands import BANDS, BandSmoother, LossRecord


def test_a_band_is_the_mean_of_its_own_rows():
    means = BandSmoother().add(torch.tensor([1.0, 3.0, 10.0]), torch.tensor([0.1, 0.2, 0.99]))
    assert means.bands[0] == pytest.approx(2)
    assert means.bands[-1] == pytest.approx(10)
    assert all(math.isnan(band) for band in means.bands[1:-1])
    assert means.mean == pytest.approx(6)


def test_the_smoothed_loss_does_not_follow_the_timesteps_that_were_drawn():
    random = torch.Generator().manual_seed(0)
    timesteps = torch.rand(300, 2, generator=random)
    record = LossRecord(1 / (0.05 + timesteps), timesteps)  # a model that learns nothing
    smoothed = torch.tensor([means.mean for means in record.smoothed()][100:])
    raw = torch.tensor(record.per_step()[100:])
    assert float(smoothed.std() / smoothed.mean()) < 0.3 * float(raw.std() / raw.mean())


def test_constant_losses_stay_what_they_are_from_the_first_step_on():
    timesteps = (torch.arange(8) + 0.5) / 8
    record = LossRecord(torch.full((5, 8), 0.25), timesteps.repeat(5, 1))
    for means in record.smoothed():
        assert means.bands == pytest.approx([0.25] * BANDS)


def test_the_csv_has_a_line_for_each_step_and_empty_cells_for_what_was_not_seen():
    record = LossRecord(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.1], [0.9]]))
    rows = list(csv.DictReader(io.StringIO(record.csv())))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert [float(row["loss"]) for row in rows] == [1, 2]
    assert rows[0]["timesteps 75-100%"] == ""
    assert float(rows[1]["timesteps 75-100%"]) == 2
    assert float(rows[1]["smoothed"]) == 1.5


def test_what_fell_is_said_to_fall_whatever_timesteps_were_drawn():
    # The loss of much noise falls; the first steps happen to be those with little noise.
    steps, learned = 100, torch.linspace(1.0, 0.5, 100)[:, None]
    timesteps = torch.rand(steps, 2, generator=torch.Generator().manual_seed(0))
    timesteps[0] = 0.9
    losses = torch.where(timesteps < 0.5, 1.0, 0.2 * learned.expand(-1, 2))
    record = LossRecord(losses, timesteps)
    smoothed = [means.mean for means in record.smoothed()]
    assert smoothed[0] < smoothed[-1]
    ends = record.ends()
    for before, after in ends[:2]:
        assert before == after == 1
    for before, after in ends[2:]:
        assert after < 0.7 * before


def test_a_band_that_was_not_drawn_at_both_ends_is_not_compared():
    record = LossRecord(torch.ones(4, 1), torch.tensor([[0.1], [0.4], [0.4], [0.1]]))
    assert record.ends()[0] == (1, 1)
    assert all(math.isnan(value) for pair in record.ends()[1:] for value in pair)
