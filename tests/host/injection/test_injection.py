"""Concepts in a real model: the same numbers as the pure function, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import gc

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfyui_perfusion.host.injection import injection, shared_inputs
from comfyui_perfusion.host.injection.apply import applied_concepts, apply_concepts
from comfyui_perfusion.host.models.families import cross_attentions
from comfyui_perfusion.perfusion import edit_projection

PROMPT = "a <a> and <b>, on the (beach:1.2)"
# fp32; the pure function sums in another order.
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@pytest.fixture
def two(worlds):
    """Two concepts of SD1.x."""
    return worlds.concept("sd1", 0, "<a>"), worlds.concept("sd1", 1, "<b>", strength=0.7)


def projections(model):
    for layer in cross_attentions(model.model):
        yield layer.to_k
        yield layer.to_v


def loaded(model):
    comfy.model_management.load_models_gpu([model])
    return model


def assert_close(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, **CLOSE)


def test_each_projection_is_the_pure_function(worlds, two):
    model = worlds.model("sd1")
    weights = [module.weight.detach().clone() for module in projections(model)]
    patched, _ = apply_concepts(model, worlds.clip("sd1"), two)
    encodings = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(3)) * 3
    layers = cross_attentions(loaded(patched).model)
    directions = [concept.direction() for concept in two]
    with torch.inference_mode():
        for at, layer in enumerate(layers):
            key, value = weights[2 * at : 2 * at + 2]
            locked = torch.stack([key @ concept.superclass_encoding for concept in two])
            learned = torch.stack([concept.o_v[layer.name] for concept in two])
            expected = edit_projection(key, encodings, directions, locked)
            assert_close(layer.to_k(encodings), expected)
            assert_close(
                layer.to_v(encodings), edit_projection(value, encodings, directions, learned)
            )


def test_trained_keys_take_the_place_of_locked_ones(worlds):
    model = worlds.model("sd1")
    concept = worlds.concept("sd1")
    keys = {name: torch.randn_like(output) for name, output in concept.o_v.items()}
    trained = worlds.concept("sd1", 1, "<b>")
    trained = dataclasses.replace(trained, **{"o_k": keys})
    patched, _ = apply_concepts(model, worlds.clip("sd1"), [concept, trained])
    layer = cross_attentions(loaded(patched).model)[0]
    encodings = torch.randn(1, 7, 768)
    weight = layer.to_k.weight
    outputs = torch.stack([weight @ concept.superclass_encoding, keys[layer.name]])
    directions = [concept.direction(), trained.direction()]
    assert_close(layer.to_k(encodings), edit_projection(weight, encodings, directions, outputs))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl_refiner"])
def test_a_sampled_picture_is_that_of_a_unet_made_of_the_pure_function(worlds, family):
    model = worlds.model(family)
    concepts = [worlds.concept(family, 0, "<a>"), worlds.concept(family, 1, "<b>", strength=0.7)]
    patched, clip = apply_concepts(model, worlds.clip(family), concepts)
    steps = 1 if family.startswith("sdxl") else 2
    expected = worlds.sample(worlds.pure(model, concepts), clip, PROMPT, steps)
    found = worlds.sample(patched, clip, PROMPT, steps)
    assert_close(found, expected)
    assert not torch.allclose(found, worlds.sample(model, clip, PROMPT, steps), atol=1e-2)


def test_no_concepts_and_strength_0_are_bit_identical_to_the_unpatched_model(worlds):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    expected = worlds.sample(model, clip, "a cat")
    nothing, _ = apply_concepts(model, clip, [])
    silent, _ = apply_concepts(model, clip, [worlds.concept("sd1", strength=0.0)])
    assert torch.equal(worlds.sample(nothing, clip, "a cat"), expected)
    assert torch.equal(worlds.sample(silent, clip, "a cat"), expected)


def test_a_concept_of_strength_0_does_not_change_the_others(worlds, two):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    alone, _ = apply_concepts(model, clip, two[:1])
    both, clip = apply_concepts(model, clip, [two[0], two[1].with_gate(strength=0.0)])
    assert torch.equal(worlds.sample(both, clip, PROMPT), worlds.sample(alone, clip, PROMPT))


def test_chaining_two_nodes_equals_one_with_both(worlds, two):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    once, clip_once = apply_concepts(model, clip, two)
    first, clip_first = apply_concepts(model, clip, two[:1])
    chained, clip_chained = apply_concepts(first, clip_first, two[1:])
    assert applied_concepts(chained) == two
    assert torch.equal(
        worlds.sample(chained, clip_chained, PROMPT), worlds.sample(once, clip_once, PROMPT)
    )
    assert applied_concepts(first) == two[:1]


def test_after_sampling_the_base_model_is_bit_identical_in_weights_and_results(worlds, two):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    before, expected = worlds.state(model), worlds.sample(model, clip, "a cat")
    patched, clip_patched = apply_concepts(model, clip, two)
    worlds.sample(patched, clip_patched, PROMPT)
    assert torch.equal(worlds.sample(model, clip, "a cat"), expected)
    assert worlds.same(worlds.state(model), before)
    assert not any("forward" in vars(module) for module in projections(model))


def test_clones_carry_the_concepts_and_each_patcher_its_own(worlds, two):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    first, clip_first = apply_concepts(model, clip, two[:1])
    second, _ = apply_concepts(model, clip, two[1:])
    alone = worlds.sample(first, clip_first, "a <a>")
    other = worlds.sample(second, clip_first, "a <a>")
    assert not torch.allclose(alone, other, atol=1e-2)
    assert torch.equal(worlds.sample(first.clone(), clip_first, "a <a>"), alone)
    assert torch.equal(worlds.sample(first.clone().clone(), clip_first, "a <a>"), alone)
    assert torch.equal(worlds.sample(second, clip_first, "a <a>"), other)


def test_a_clone_taken_while_injected_ejects_only_itself(worlds, two):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    patched, clip_patched = apply_concepts(model, clip, two)
    expected = worlds.sample(patched, clip_patched, PROMPT)
    copied = patched.clone()
    assert copied.is_injected
    del copied
    gc.collect()
    assert all("forward" in vars(module) for module in projections(patched))
    assert torch.equal(worlds.sample(patched, clip_patched, PROMPT), expected)


def test_a_patcher_that_is_thrown_away_takes_its_edit_along(worlds, two):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    patched, clip_patched = apply_concepts(model, clip, two)
    worlds.sample(patched, clip_patched, PROMPT, 1)
    del patched
    gc.collect()
    assert not any("forward" in vars(module) for module in projections(model))


def test_injecting_twice_and_ejecting_twice_is_harmless(worlds, two):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    patched, clip_patched = apply_concepts(model, clip, two)
    expected = worlds.sample(patched, clip_patched, PROMPT)
    (only,) = patched.get_injections(injection.KEY)
    only.inject(patched)
    only.inject(patched)
    assert torch.equal(worlds.sample(patched, clip_patched, PROMPT), expected)
    only.eject(patched)
    only.eject(patched)
    assert not any("forward" in vars(module) for module in projections(model))


def test_with_a_lora_below_or_above_it_is_the_pure_function_of_the_sum(worlds, two):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    before = worlds.state(model)
    lora = worlds.lora(model, 5)
    below, clip_patched = apply_concepts(worlds.with_lora(model, lora), clip, two)
    above = worlds.with_lora(apply_concepts(model, clip, two)[0], lora)
    expected = worlds.sample(worlds.pure(model, list(two), lora), clip_patched, PROMPT)
    assert_close(worlds.sample(below, clip_patched, PROMPT), expected)
    assert_close(worlds.sample(above, clip_patched, PROMPT), expected)
    comfy.model_management.unload_all_models()
    assert worlds.same(worlds.state(model), before)


def test_another_packs_forward_laid_over_ours_survives_and_so_does_ours(worlds, two):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    patched, clip_patched = apply_concepts(model, clip, two)
    expected = worlds.sample(patched, clip_patched, PROMPT)
    module = next(projections(patched))
    below = module.forward
    calls = []

    def on_top(encodings):
        calls.append(encodings.shape)
        return below(encodings)

    module.forward = on_top
    assert torch.equal(worlds.sample(patched, clip_patched, PROMPT), expected)
    assert calls
    plain = worlds.sample(model, clip, "a cat")
    module.forward = below
    assert torch.equal(worlds.sample(patched, clip_patched, PROMPT), expected)
    assert torch.equal(worlds.sample(model, clip, "a cat"), plain)


@pytest.mark.parametrize("order", ["below", "above"])
def test_a_lora_in_bypass_mode_below_or_above_leaves_the_model_as_it_was(worlds, two, order):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    plain = worlds.sample(model, clip, "a cat")

    def bypass(patcher):
        lora = worlds.lora(model, 5)
        return comfy.sd.load_bypass_lora_for_models(patcher, None, lora, 1.0, 0.0)[0]

    if order == "below":
        both, clip_patched = apply_concepts(bypass(model), clip, two)
    else:
        patched, clip_patched = apply_concepts(model, clip, two)
        both = bypass(patched)
    first = worlds.sample(both, clip_patched, PROMPT)
    assert torch.equal(worlds.sample(model, clip, "a cat"), plain)
    assert torch.equal(worlds.sample(both, clip_patched, PROMPT), first)
    if order == "below":
        expected = worlds.sample(
            worlds.pure(model, list(two), worlds.lora(model, 5)), clip_patched, PROMPT
        )
        assert_close(first, expected)
    alone, _ = apply_concepts(model, clip, two)
    assert not torch.allclose(worlds.sample(alone, clip_patched, PROMPT), first, atol=1e-2)


def test_a_context_changed_by_an_attention_patch_is_edited_as_changed(worlds, two):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")

    def half(n, context, value, extra_options):
        return n, context * 0.5, value

    patched, clip_patched = apply_concepts(model, clip, two)
    patched.set_model_attn2_patch(half)
    pure = worlds.pure(model, list(two))
    pure.set_model_attn2_patch(half)
    found = worlds.sample(patched, clip_patched, PROMPT)
    assert_close(found, worlds.sample(pure, clip_patched, PROMPT))


def test_gates_are_computed_once_per_model_call_and_nothing_is_kept(worlds, two, monkeypatch):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    patched, clip_patched = apply_concepts(model, clip, two)
    calls = []
    original = shared_inputs.gated_inputs

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(shared_inputs, "gated_inputs", counted)
    worlds.sample(patched, clip_patched, PROMPT, 3)
    assert len(calls) == 3
    module = next(projections(patched))
    shared = module.forward.active.shared
    assert shared.encodings is shared.inputs is shared.gates is None


def test_encodings_that_change_between_steps_under_one_name_are_noticed(worlds, two):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")

    def fading(apply_model, args):
        shrink = 0.5 + float(args["timestep"][0]) / 30
        changed = {**args["c"], "c_crossattn": args["c"]["c_crossattn"] * shrink}
        return apply_model(args["input"], args["timestep"], **changed)

    patched, clip_patched = apply_concepts(model, clip, two)
    patched.set_model_unet_function_wrapper(fading)
    pure = worlds.pure(model, list(two))
    pure.set_model_unet_function_wrapper(fading)
    found = worlds.sample(patched, clip_patched, PROMPT, 3)
    assert_close(found, worlds.sample(pure, clip_patched, PROMPT, 3))


def test_locked_keys_are_computed_once_per_load_and_not_per_step(worlds, two, monkeypatch):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    patched, clip_patched = apply_concepts(model, clip, two)
    calls = []
    original = injection.InjectedProjection.prepare

    def counted(self, *args):
        calls.append(self)
        return original(self, *args)

    monkeypatch.setattr(injection.InjectedProjection, "prepare", counted)
    worlds.sample(patched, clip_patched, PROMPT, 3)
    assert len(calls) == 32


def test_a_half_precision_model_keeps_its_dtype_and_agrees_within_it(worlds, two):
    model, clip = worlds.new_model("sd1"), worlds.clip("sd1")
    model.set_model_compute_dtype(torch.bfloat16)
    patched, clip_patched = apply_concepts(model, clip, two)
    found = worlds.sample(patched, clip_patched, PROMPT, 1)
    exact = worlds.sample(worlds.pure(worlds.model("sd1"), list(two)), clip_patched, PROMPT, 1)
    scale = float(exact.abs().max())
    torch.testing.assert_close(found / scale, exact / scale, rtol=0.1, atol=0.05)


def test_a_deep_copy_of_an_injected_model_is_independent_of_it(worlds, two):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    patched, _ = apply_concepts(model, clip, two)
    loaded(patched)
    config = patched.model.model_config
    copied = copy.deepcopy(patched.model, {id(config): config})
    encodings = torch.randn(1, 7, 768)
    ours, theirs = cross_attentions(patched.model)[0], cross_attentions(copied)[0]
    expected = ours.to_v(encodings).clone()
    with torch.no_grad():
        theirs.to_v.weight.zero_()
    assert torch.equal(ours.to_v(encodings), expected)
    assert not torch.allclose(theirs.to_v(encodings), expected)


def test_sampling_without_the_injection_is_an_error_and_not_a_silent_no_op(worlds, two):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    patched, clip_patched = apply_concepts(model, clip, two)
    patched.remove_injections(injection.KEY)
    with pytest.raises(RuntimeError, match="their edit is not in it"):
        worlds.sample(patched, clip_patched, PROMPT, 1)
