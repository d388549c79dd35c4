"""Private copies of models whose weights are quantised, with dynamic VRAM off."""

from __future__ import annotations

import json

import comfy.ops
import pytest
import torch
from comfy import model_base, model_patcher

from tests.host.training_world import gradients, view_of

CPU = torch.device("cpu")
# fp8 weights are computed with as they are; with int8 ones the inputs are rounded to 8 bits too,
# half a step of 1/127 each, in the three projections of every layer.
AGREEMENT = {"float8_e4m3fn": 1e-4, "int8_tensorwise": 6 * 0.5 / 127}
QUANTISED = ("to_q.weight", "to_k.weight", "to_v.weight")


def quantised_state(worlds, kind):
    """The state of a quantised checkpoint of a small model, and its values in fp32."""
    base = worlds.base_model("sd1_light")
    worlds.randomise(base.diffusion_model, 0)
    state, values = {}, {}
    largest, dtype = (448, torch.float8_e4m3fn) if kind == "float8_e4m3fn" else (127, torch.int8)
    for name, weight in base.diffusion_model.state_dict().items():
        if not name.endswith(QUANTISED):
            state[name] = values[name] = weight
            continue
        scale = (weight.abs().max() / largest).float()
        stored = weight / scale
        stored = (stored.round() if dtype is torch.int8 else stored).to(dtype)
        conf = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
        state |= {name: stored, f"{name}_scale": scale, name.replace("weight", "comfy_quant"): conf}
        values[name] = stored.float() * scale
    return state, values


def load_quantised(worlds, state, disable_dynamic=True):
    """What a loader node of a quantised checkpoint hands out."""
    base = worlds.base_model("sd1_light")
    config = base.model_config
    config.custom_operations = comfy.ops.mixed_precision_ops(
        {}, torch.float32, full_precision_mm=True
    )
    loaded = model_base.BaseModel(config, device=CPU)
    loaded.diffusion_model.load_state_dict(dict(state))
    patcher = model_patcher.ModelPatcher(loaded, CPU, CPU)
    patcher.cached_patcher_init = (load_quantised, (worlds, state))
    return patcher


@pytest.fixture(scope="module")
def rest(worlds):
    """The text encoder, VAE and pictures."""
    images = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    return worlds.clip("sd1"), worlds.vae(), images


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8_tensorwise"])
@pytest.mark.parametrize("can_be_loaded_again", [True, False])
def test_a_quantised_model_trains_as_its_values_do(worlds, rest, kind, can_be_loaded_again):
    state, values = quantised_state(worlds, kind)
    model = load_quantised(worlds, state)
    if not can_be_loaded_again:
        model.cached_patcher_init = None
    with view_of((model, *rest)) as view:
        assert view.patcher.model is not model.model
        loss, found = gradients(view)
    plain = worlds.base_model("sd1_light")
    plain.diffusion_model.load_state_dict(values)
    with view_of((worlds.patcher(plain), *rest)) as view:
        expected_loss, expected = gradients(view)
    assert float(loss) == pytest.approx(float(expected_loss), rel=AGREEMENT[kind])
    for name, gradient in found.items():
        distance = float((gradient - expected[name]).norm() / expected[name].norm())
        assert distance < AGREEMENT[kind], name
