"""Concepts under one guider of two models (ComfyUI's Dual Model CFG Guider)."""

from __future__ import annotations

import itertools
import logging

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import DualModelGuider
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.nodes.schedule import PerfusionScheduleGate

PROMPT = "a <a> on the beach"
WORDS = ((0, "<a>"), (1, "<b>"))
CLOSE = {"rtol": 2e-4, "atol": 2e-4}
STEPS = 3


def assert_close(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, **CLOSE)


def planned(concept, plan):
    if plan is None:
        return concept
    return PerfusionScheduleGate.execute(concept, *plan, 0.5, 0.5, 0.2, 0.2, "").args[0]


def guided(model, other, positive, negative, steps=STEPS):
    guider = DualModelGuider.execute(model, positive, 2.0, other, negative).args[0]
    sampling = model.model.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return guider.sample(
            noise, torch.zeros(1, 4, 8, 8), comfy.samplers.sampler_object("euler"), sigmas
        )


@pytest.mark.parametrize("plan", [None, (0.0, 0.5)])
@pytest.mark.parametrize("concept_on", ["positive", "negative"])
def test_two_models_under_one_guider_with_a_concept_on_one_of_them(worlds, plan, concept_on):
    first, second = worlds.new_model("sd1_light", 0), worlds.new_model("sd1_light", 7)
    concept = planned(worlds.concept("sd1_light", 0, "<a>"), plan)
    chosen = first if concept_on == "positive" else second
    patched, clip = apply_concepts(chosen, worlds.clip("sd1"), [concept])
    text, plain = worlds.encode(clip, PROMPT), worlds.encode(worlds.clip("sd1"), "a cat")
    if concept_on == "positive":
        models, conds = (patched, second), (text, plain)
    else:
        models, conds = (first, patched), (plain, text)
    found = guided(*models, *conds)
    # The same by guidance without a second model: each model alone, one step after the other.
    assert_close(found, by_hand(*models, *conds))


def by_hand(model, other, positive, negative, steps=STEPS):
    """Euler's method over each model's own predictions, sampled one step at a time."""
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", steps)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = x * torch.sqrt(1.0 + sigmas[0] ** 2)

    def predicted(patcher, cond, sigma):
        guider = comfy.samplers.CFGGuider(patcher)
        guider.inner_set_conds({"positive": cond})
        guider.set_cfg(1.0)
        # One step of Euler's method to 0 is the prediction.
        start = x / sigma if float(sigma) != float(sigmas[0]) else x
        seen = []

        class Once(comfy.samplers.Sampler):
            def sample(self, wrap, *args, **kwargs):
                seen.append(wrap(x, sigma[None], **{"model_options": args[1]["model_options"]}))
                return x

        with torch.inference_mode():
            guider.sample(start, torch.zeros_like(x), Once(), torch.stack([sigma, sigmas[-1]]))
        return seen[0]

    for now, then in itertools.pairwise(sigmas):
        cond, uncond = predicted(model, positive, now), predicted(other, negative, now)
        denoised = uncond + (cond - uncond) * 2.0
        x = x + (x - denoised) / now * (then - now)
    return model.model.process_latent_out(x.float())


@pytest.fixture(scope="module")
def model(worlds):
    return worlds.new_model("sd1_light", 0)


@pytest.mark.parametrize("plan", [None, (0.0, 0.5)])
@pytest.mark.parametrize("key_lock", ["local", "global", "twin"])
def test_a_clone_without_the_concept_is_shown_its_prompts_without_it(worlds, model, key_lock, plan):
    concept = planned(worlds.concept("sd1_light", 0, "<a>"), plan)
    patched, clip = apply_concepts(model, worlds.clip("sd1"), [concept], key_lock)
    # The same prompt for both: only the model tells them apart.
    text = worlds.encode(clip, PROMPT)
    # ComfyUI gives both clones the weights of the first, which are the same here.
    expected = by_hand(patched, model, text, text)
    found = guided(patched, model, text, text)
    again = guided(patched, model, text, text)
    assert_close(found, expected)
    assert torch.equal(again, found)
    assert not torch.allclose(found, by_hand(patched, patched, text, text), atol=1e-3)


def test_two_clones_with_the_same_concept_are_one_model(worlds, model, caplog):
    patched, clip = apply_concepts(
        model, worlds.clip("sd1"), [worlds.concept("sd1_light", 0, "<a>")]
    )
    text, plain = worlds.encode(clip, PROMPT), worlds.encode(clip, "a cat")
    with caplog.at_level(logging.WARNING, "perfusion"):
        found = guided(patched, patched.clone(), text, plain)
    assert not caplog.records
    assert_close(found, by_hand(patched, patched, text, plain))


@pytest.mark.parametrize("first", ["plain", "another concept"])
def test_a_second_clone_that_comfyui_leaves_unloaded_is_told_of(worlds, model, first, caplog):
    stock, concepts = worlds.clip("sd1"), [worlds.concept("sd1_light", n, w) for n, w in WORDS]
    (one, clip), (two, _) = (apply_concepts(model, stock, [concept]) for concept in concepts)
    # What was said once is not said again, so each case has a word of its own.
    main, other, word = (model, one, "<a>") if first == "plain" else (one, two, "<b>")
    text = worlds.encode(clip, PROMPT)
    with caplog.at_level(logging.WARNING, "perfusion"):
        guided(main, other, text, text)
    said = [each.getMessage() for each in caplog.records if "negative model" in each.getMessage()]
    assert len(said) == 1
    assert f"{word}: without effect" in said[0]
    assert "a second time" in said[0]
    caplog.clear()
    # Used by itself afterwards, nothing is left of it.
    with caplog.at_level(logging.WARNING, "perfusion"):
        worlds.sample(one, clip, PROMPT)
        worlds.sample(model, stock, "a cat")
    assert not caplog.records
