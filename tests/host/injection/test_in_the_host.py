"""Concepts beside what else a graph does: two models at once, patches, copies, deletion."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.model_sampling import ModelSamplingDiscrete
from comfyui_perfusion.host.injection.agenda import clock_of
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import cross_attentions
from comfyui_perfusion.host.text.twin import TwinEncoding, untwined, with_twin
from comfyui_perfusion.host.training.private_copy import private_clip

PROMPT = "a <a> on the beach"
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def assert_close(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, **CLOSE)


@pytest.mark.parametrize("key_lock", ["local", "global"])
def test_a_patch_that_changes_only_the_values_is_edited_as_changed(worlds, key_lock):
    def half(n, context, value, extra_options):
        return n, context, value * 0.5

    model, stock = worlds.model("sd1_light"), worlds.clip("sd1")
    concept = worlds.concept("sd1_light", 0, "<a>")
    patched, clip = apply_concepts(model, stock, [concept], key_lock)
    patched.set_model_attn2_patch(half)
    found = worlds.sample(patched, clip, PROMPT)
    pure = worlds.pure(model, [concept])
    pure.set_model_attn2_patch(half)
    if key_lock == "global":
        assert torch.isfinite(found).all()
    else:
        assert_close(found, worlds.sample(pure, clip, PROMPT))


def test_a_patch_that_writes_into_the_context_is_edited_as_written(worlds):
    def write(n, context, value, extra_options):
        context *= 0.9
        return n, context, value

    model, stock = worlds.model("sd1_light"), worlds.clip("sd1")
    concept = worlds.concept("sd1_light", 0, "<a>")
    patched, clip = apply_concepts(model, stock, [concept])
    pure = worlds.pure(model, [concept])
    for each in (patched, pure):
        each.set_model_attn2_patch(write)
    # One step: the context is the sampler's own tensor otherwise, written to again and again.
    found = worlds.sample(patched, clip, PROMPT, 1)
    assert_close(found, worlds.sample(pure, clip, PROMPT, 1))
    locked, clip = apply_concepts(model, stock, [concept], "global")
    locked.set_model_attn2_patch(write)
    with pytest.raises(RuntimeError, match="use local key lock with that node"):
        worlds.sample(locked, clip, PROMPT, 1)


def test_the_clock_of_a_noise_schedule_is_made_once_and_reads_nothing_one_by_one(
    worlds, monkeypatch
):
    sampling = worlds.new_model("sd1_light").model.model_sampling
    calls = []
    original = ModelSamplingDiscrete.sigma

    def sigma(self, timestep):
        calls.append(timestep.numel())
        return original(self, timestep)

    monkeypatch.setattr(ModelSamplingDiscrete, "sigma", sigma)
    clock = clock_of(sampling)
    assert clock_of(sampling) is clock
    assert calls == [1001]
    one_by_one = [sampling.percent_to_sigma(point) for point in clock._points]
    assert clock._sigmas == one_by_one


def test_a_deleted_model_is_gone_at_once(worlds):
    model, stock = worlds.new_model("sd1_light"), worlds.clip("sd1")
    patched, clip = apply_concepts(model, stock, [worlds.concept("sd1_light", 0, "<a>")])
    worlds.sample(patched, clip, PROMPT, 1)
    weights = weakref.ref(cross_attentions(model.model)[0].to_k)
    gc.collect()
    gc.disable()
    try:
        comfy.model_management.unload_all_models()
        del model, patched
        assert weights() is None
    finally:
        gc.enable()


def test_a_private_copy_of_the_text_encoder_makes_its_twins_itself(worlds):
    stock = worlds.new_clip("sd1")
    concept = worlds.concept("sd1_light", 0, "<a>")
    _, clip = apply_concepts(worlds.model("sd1_light"), stock, [concept], "global")
    with torch.inference_mode(False):
        private = private_clip(clip)
        with torch.no_grad():
            for weight in private.cond_stage_model.parameters():
                weight.mul_(1.1)
    expected = untwined(worlds.encode(private, "a cat on the beach")[0][0])[0]
    found = worlds.encode(private, PROMPT)[0][0]
    assert torch.equal(untwined(found)[1], expected)


TURNS = {
    "flip": lambda x: x.flip(1),
    "torch.flip": lambda x: torch.flip(x, (1,)),
    "clamp": lambda x: x.clamp(-3, 3),
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(0, 2, 1),
    "roll": lambda x: x.roll(1, 1),
    "gather": lambda x: x.gather(1, torch.zeros(1, 2, 3, dtype=torch.long)),
    "unbind": lambda x: x.unbind(1)[2],
}


@pytest.mark.parametrize("name", TURNS)
def test_what_moves_or_limits_tokens_does_so_to_the_twin(name):
    first, second = torch.arange(12.0).reshape(1, 4, 3), -torch.arange(12.0).reshape(1, 4, 3)
    found = TURNS[name](with_twin(first, second, frozenset({"<a>"})))
    assert isinstance(found, TwinEncoding)
    assert found.placeholders == {"<a>"}
    for each, plain in zip(untwined(found), (first, second), strict=True):
        assert torch.equal(each, TURNS[name](plain))


def test_an_ordinary_tensor_that_is_written_to_gets_the_first_encodings():
    first, second = torch.ones(1, 4, 3), torch.zeros(1, 4, 3)
    pair = with_twin(first, second, frozenset({"<a>"}))
    plain = torch.full((1, 6, 3), 5.0)
    plain[:, :4] = pair
    assert (plain[:, :4] == 1).all()
    plain[:, :4].copy_(pair)
    assert (plain[:, :4] == 1).all()
