"""The one place where bias, temperature and strength are checked."""

from __future__ import annotations

import math

import pytest
import torch

from perfusion.gated.gate import LEAST_TEMPERATURE, Gate
from perfusion.gated.rank_one import Direction, gated_inputs


@pytest.mark.parametrize("name", ["bias", "temperature", "strength"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a finite number"):
        Gate(**{name: value})


@pytest.mark.parametrize("value", [0.0, -0.1, 1e-50, LEAST_TEMPERATURE / 2])
def test_a_temperature_the_formula_cannot_take_is_refused(value):
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        Gate(temperature=value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_least_temperature_opens_and_shuts_and_gives_no_nan(dtype):
    i = torch.tensor([1.0, 2.0])
    encodings = torch.stack([i, 0.65 * i, -i, torch.zeros(2)]).to(dtype)
    direction = Direction(i, i, Gate(0.65, LEAST_TEMPERATURE))
    _, gates = gated_inputs(encodings, [direction])
    assert bool(torch.isfinite(gates).all())
    assert gates[[0, 2, 3], 0].tolist() == [1, 0, 0]
