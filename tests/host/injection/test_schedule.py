"""Scheduled concepts in a real model: exact where they act, absent where they do not."""

from __future__ import annotations

import dataclasses
import functools
import logging

import comfy.ldm.modules.attention as attention
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from comfyui_perfusion.host.injection import shared_inputs
from comfyui_perfusion.host.injection.agenda import Clock
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import cross_attentions
from comfyui_perfusion.nodes.schedule import PerfusionScheduleGate
from comfyui_perfusion.perfusion import GateSchedule, edit_projection
from torch._dynamo.utils import counters

import nodes as comfy_nodes

PROMPT = "a <a> and <b>, on the beach"
CLOSE = {"rtol": 2e-4, "atol": 2e-4}
STEPS = 4


@pytest.fixture(scope="module")
def two(worlds):
    """Two concepts of SD1.x."""
    return worlds.concept("sd1_light", 0, "<a>"), worlds.concept("sd1_light", 1, "<b>")


def scheduled(concept, start=0.0, end=1.0, blocks="", bias=(0.5, 0.5), temperature=(0.2, 0.2)):
    return PerfusionScheduleGate.execute(concept, start, end, *bias, *temperature, blocks).args[0]


def assert_close(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, **CLOSE)


def oracle(worlds, model, concepts, prefixes):
    """A UNet that asks at every call and in every layer which concepts act, and edits purely.

    `prefixes` maps a placeholder to the start of the layer names it acts in.
    """
    pure = worlds.pure(model, list(concepts))
    sampling = pure.model.model_sampling
    now = {}

    def remember(apply_model, args):
        now["sigma"] = float(args["timestep"][0])
        return apply_model(args["input"], args["timestep"], **args["c"])

    def directions(name):
        sigma = now["sigma"]
        # The inverse of percent_to_sigma by its definition: percent = 1 - timestep / 999.
        log_sigmas = sampling.log_sigmas.tolist()
        at = min(range(len(log_sigmas)), key=lambda n: abs(sampling.sigmas[n].item() - sigma))
        progress = 1 - at / 999
        found = []
        for number, concept in enumerate(concepts):
            plan = concept.schedule
            if plan is not None:
                inside = (
                    sampling.percent_to_sigma(plan.end)
                    <= sigma
                    <= sampling.percent_to_sigma(plan.start)
                )
                if not inside or not name.startswith(prefixes.get(concept.placeholder, "")):
                    continue
                part = (progress - plan.start) / (plan.end - plan.start)
                bias = plan.bias[0] + part * (plan.bias[1] - plan.bias[0])
                soft = plan.temperature[0] + part * (plan.temperature[1] - plan.temperature[0])
                concept = concept.with_schedule(None).with_gate(bias, soft)
            found.append((number, concept.direction()))
        return found

    def edited(name, weight, outputs, encodings):
        found = directions(name)
        if not found:
            return torch.nn.functional.linear(encodings, weight)
        rows = torch.stack([outputs[number] for number, _ in found])
        return edit_projection(weight, encodings, [d for _, d in found], rows)

    for layer in cross_attentions(pure.model):
        for part, module in (("to_k", layer.to_k), ("to_v", layer.to_v)):
            weight = module.weight
            outputs = [
                weight @ c.superclass_encoding if part == "to_k" else c.o_v[layer.name]
                for c in concepts
            ]
            module.forward = functools.partial(edited, layer.name, weight, outputs)
    pure.set_model_unet_function_wrapper(remember)
    return pure


# name -> the two concepts as scheduled, and where each acts.
PLANS = {
    "early": (lambda a, b: (scheduled(a, 0.0, 0.4), b), {}),
    "late": (lambda a, b: (scheduled(a, 0.6, 1.0), b), {}),
    "one after the other": (lambda a, b: (scheduled(a, 0.0, 0.5), scheduled(b, 0.5, 1.0)), {}),
    "with a break": (lambda a, b: (scheduled(a, 0.3, 0.5), scheduled(b, 0.2, 0.6)), {}),
    "a moving gate": (lambda a, b: (scheduled(a, bias=(0.3, 0.7), temperature=(0.1, 0.3)), b), {}),
    "a moving gate in a range": (lambda a, b: (scheduled(a, 0.2, 0.9, bias=(0.7, 0.2)), b), {}),
    "in the middle": (lambda a, b: (scheduled(a, blocks="middle"), b), {"<a>": "middle_block"}),
    "up and down": (
        lambda a, b: (scheduled(a, blocks="down"), scheduled(b, blocks="UP")),
        {"<a>": "input_blocks", "<b>": "output_blocks"},
    ),
    "one block for a while": (
        lambda a, b: (scheduled(a, 0.2, 0.8, "input_blocks.1"), b),
        {"<a>": "input_blocks.1."},
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_scheduled_concept_is_the_pure_function_where_it_acts_and_nothing_elsewhere(
    worlds, two, name
):
    plan, prefixes = PLANS[name]
    concepts = plan(*two)
    model = worlds.model("sd1_light")
    patched, clip = apply_concepts(model, worlds.clip("sd1"), concepts)
    expected = worlds.sample(oracle(worlds, model, concepts, prefixes), clip, PROMPT, STEPS)
    found = worlds.sample(patched, clip, PROMPT, STEPS)
    assert_close(found, expected)
    always, _ = apply_concepts(model, worlds.clip("sd1"), two)
    assert not torch.allclose(found, worlds.sample(always, clip, PROMPT, STEPS), atol=1e-3)


def test_outside_of_its_range_a_concept_changes_no_bit_and_computes_nothing(
    worlds, two, monkeypatch, caplog
):
    model = worlds.model("sd1_light")
    # Between two steps of the schedule.
    concepts = [scheduled(concept, 0.501, 0.502) for concept in two]
    patched, clip = apply_concepts(model, worlds.clip("sd1"), concepts)
    monkeypatch.setattr(
        shared_inputs, "gated_inputs", lambda *_: pytest.fail("computed without need")
    )
    expected = worlds.sample(model, clip, PROMPT, 3)
    with caplog.at_level(logging.WARNING, logger="perfusion"):
        assert torch.equal(worlds.sample(patched, clip, PROMPT, 3), expected)
    assert caplog.text.count("met no step of this sampling run") == 2


def test_a_schedule_over_everything_with_a_still_gate_is_no_schedule(worlds, two):
    model, stock = worlds.model("sd1_light"), worlds.clip("sd1")
    plain, clip = apply_concepts(model, stock, two)
    concepts = [
        scheduled(c, bias=(c.gate.bias,) * 2, temperature=(c.gate.temperature,) * 2) for c in two
    ]
    patched, _ = apply_concepts(model, stock, concepts)
    assert torch.equal(worlds.sample(patched, clip, PROMPT), worlds.sample(plain, clip, PROMPT))


def test_with_global_lock_the_keys_are_the_twins_only_while_the_concepts_act(worlds, two):
    model, stock = worlds.model("sd1_light"), worlds.clip("sd1")
    concepts = [scheduled(concept, 0.4, 1.0, "up") for concept in two]
    patched, clip = apply_concepts(model, stock, concepts, "global")
    always, _ = apply_concepts(model, stock, two, "global")
    pictures = [worlds.sample(each, clip, PROMPT, STEPS) for each in (model, patched, always)]
    assert not torch.allclose(pictures[0], pictures[1], atol=1e-3)
    assert not torch.allclose(pictures[1], pictures[2], atol=1e-3)
    never = [scheduled(concept, 0.501, 0.502) for concept in two]
    silent, _ = apply_concepts(model, stock, never, "global")
    assert torch.equal(
        worlds.sample(silent, clip, PROMPT, 3), worlds.sample(model, clip, PROMPT, 3)
    )


def test_parallel_concepts_may_take_turns(worlds, two):
    twin = dataclasses.replace(two[0], **{"placeholder": "<b>"})
    model, stock = worlds.model("sd1_light"), worlds.clip("sd1")
    with pytest.raises(ValueError, match="parallel"):
        apply_concepts(model, stock, [scheduled(two[0], 0, 0.5), scheduled(twin, 0.4, 1)])
    turns = [scheduled(two[0], 0, 0.4), scheduled(twin, 0.5, 1)]
    patched, clip = apply_concepts(model, stock, turns)
    assert torch.isfinite(worlds.sample(patched, clip, PROMPT)).all()


def test_a_block_the_model_lacks_is_refused_with_those_it_has(worlds, two):
    concept = scheduled(two[0], blocks="down, input_blocks.77")
    with pytest.raises(ValueError, match=r"'input_blocks.77'.*down, middle, up, input_blocks.1,"):
        apply_concepts(worlds.model("sd1_light"), worlds.clip("sd1"), [concept])


def test_a_compiled_model_follows_the_schedule_with_one_graph_for_each_state(
    worlds, two, monkeypatch
):
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    model, stock = worlds.new_model("small"), worlds.clip("sd1")
    fitting = [worlds.fitting_concept(model, stock, at, f"<{'ab'[at]}>") for at in (0, 1)]
    concepts = [scheduled(fitting[0], 0.0, 0.6, "down", bias=(0.3, 0.6)), fitting[1]]
    patched, clip = apply_concepts(model, stock, concepts)
    expected = worlds.sample(patched, clip, PROMPT, STEPS)
    compiled = patched.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model=compiled, backend="eager", options=options)
    torch._dynamo.reset()
    counters.clear()
    assert torch.equal(worlds.sample(compiled, clip, PROMPT, STEPS), expected)
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_the_clock_is_the_inverse_of_comfyuis_percentages(worlds):
    sampling = worlds.model("sd1_light").model.model_sampling
    clock = Clock(sampling)
    for percent in (0.001, 0.1234, 0.5, 0.8, 0.999):
        assert clock.progress(sampling.percent_to_sigma(percent)) == pytest.approx(
            percent, abs=2e-4
        )
    assert clock.progress(1e9) == 0
    assert clock.progress(0.0) == 1


def test_the_range_is_that_of_comfyuis_own_timestep_ranges(worlds, two):
    """A concept on while its prompt is on, beside the plain prompt in the rest of the time."""
    model, stock = worlds.model("sd1_light"), worlds.clip("sd1")
    patched, clip = apply_concepts(model, stock, [scheduled(two[0], 0.0, 0.4)])
    always, _ = apply_concepts(model, stock, [two[0].with_gate(0.5, 0.2)])

    def in_range(text, start, end):
        set_range = comfy_nodes.ConditioningSetTimestepRange().set_range
        return set_range(worlds.encode(clip, text), start, end)[0]

    word = in_range("a <a>", 0.0, 0.4)
    negative = worlds.encode(clip, "")
    # No part of these runs has a prompt for the rest: the prediction there is 0.
    first = worlds.sample_conds(patched, word, negative, STEPS, cfg=1.0)
    second = worlds.sample_conds(always, word, negative, STEPS, cfg=1.0)
    assert torch.equal(first, second)


def test_one_schedule_behind_another_takes_its_place(two):
    again = scheduled(scheduled(two[0], 0.1, 0.2), 0.3, 0.4)
    assert again.schedule == GateSchedule(0.3, 0.4, (0.5, 0.5), (0.2, 0.2))
