"""Twin lock: whatever names no concept is the base model's to the last bit, and the rest exact."""

from __future__ import annotations

import dataclasses

import comfy.model_management
import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfyui_perfusion.host.injection import twin_inputs
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import cross_attentions
from comfyui_perfusion.host.text.twin import TwinEncoding, untwined
from comfyui_perfusion.perfusion import GateSchedule
from comfyui_perfusion.perfusion.gated.twin_lock import (
    named_tokens,
    open_twin_gates,
)

import nodes as comfy_nodes
from tests.host.first_step import seen_rows
from tests.host.twin_oracle import oracle

FAMILY = "sd1_light"
PROMPT = "a <a> and (<b>:1.3), on the beach"
TWIN_PROMPT = "a cat and (teddy bear:1.3), on the beach"
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@pytest.fixture(scope="module")
def two(worlds):
    """Two concepts of SD1.x with open gates, the second's superclass of two sub-words."""
    first = worlds.concept(FAMILY, 0, "<a>", bias=-1.0)
    second = worlds.concept(FAMILY, 1, "<b>", bias=-1.0, strength=0.7)
    return first, dataclasses.replace(second, superclass="teddy bear", twin_locked=True)


@pytest.fixture(scope="module")
def applied(worlds, two):
    """MODEL and CLIP with both concepts and twin lock."""
    return apply_concepts(worlds.model(FAMILY), worlds.clip("sd1"), two, "twin")


def assert_close(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, **CLOSE)


def rows_of(model, positive, negative, worlds):
    """What the model gives for each conditioning at the first step: (positive, negative)."""
    return seen_rows(model, lambda clone: worlds.sample_conds(clone, positive, negative, 1))


@pytest.mark.parametrize("family", ["sd1_light", "sd2_light", "sdxl_light"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prompt_that_names_no_concept_gives_the_base_models_picture_to_the_last_bit(
    worlds, family, dtype
):
    model, stock = worlds.new_model(family), worlds.clip(family)
    model.set_model_compute_dtype(dtype)
    # Gates that stand open for any word.
    concept = worlds.concept(family, 0, "<a>", bias=-5.0)
    before = worlds.state(model)
    patched, clip = apply_concepts(model, stock, [concept], "twin")
    plain = [worlds.encode(stock, text) for text in ("a cat on the beach", "bad")]
    expected = worlds.sample_conds(model, *plain, 1, batch=2)
    known = [worlds.encode(clip, text) for text in ("a cat on the beach", "bad")]
    assert torch.equal(worlds.sample_conds(patched, *known, 1, batch=2), expected)
    # The negative beside a positive that names it, in one batch.
    named = worlds.encode(clip, "a <a> on the beach")
    found, uncond = rows_of(patched, named, known[1], worlds)
    base, base_uncond = rows_of(model, *plain, worlds)
    assert torch.equal(uncond, base_uncond)
    assert not torch.allclose(found, base, atol=1e-2)
    # And the other way round.
    cond, _ = rows_of(patched, known[0], named, worlds)
    assert torch.equal(cond, base)
    comfy.model_management.unload_all_models()
    assert worlds.same(worlds.state(model), before)
    for layer in cross_attentions(model.model):
        assert "forward" not in vars(layer.to_k)
        assert "forward" not in vars(layer.to_v)


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_with_steps_left_out_by_a_cache_it_is_still_the_base_models_picture(worlds, node):
    model, stock = worlds.model(FAMILY), worlds.clip("sd1")
    patched, clip = apply_concepts(
        model, stock, [worlds.concept(FAMILY, 0, "<a>", bias=-5.0)], "twin"
    )
    found, cached, named, every = (
        worlds.sample(each, words, text, 8)
        for each, words, text in (
            (with_cache(node, patched), clip, "a cat on the beach"),
            (with_cache(node, model), stock, "a cat on the beach"),
            (with_cache(node, patched), clip, "a <a> on the beach"),
            (model, stock, "a cat on the beach"),
        )
    )
    assert torch.equal(found, cached)
    assert not torch.equal(cached, every), "the cache left no step out"
    assert not torch.allclose(named, cached, atol=1e-2)


def with_cache(node, model):
    """The model with one of ComfyUI's caches, at a threshold that leaves steps out."""
    return node.execute(model, 3.0, 0.1, 0.95, False).args[0]


def concat(first, second):
    return comfy_nodes.ConditioningConcat().concat(first, second)[0]


def average(first, second):
    return comfy_nodes.ConditioningAverage().addWeighted(first, second, 0.3)[0]


def in_area(cond):
    return comfy_nodes.ConditioningSetArea().append(cond, 32, 64, 0, 0, 1.0)[0]


# name -> (positive, negative) of the conditionings of the prompt, another prompt and nothing.
GRAPHS = {
    "plain": lambda prompt, other, nothing: (prompt, nothing),
    "combine and area": lambda prompt, other, nothing: (in_area(prompt) + other, nothing),
    "concat": lambda prompt, other, nothing: (concat(nothing, prompt), nothing),
    "average": lambda prompt, other, nothing: (average(nothing, prompt), nothing),
    "average of two": lambda prompt, other, nothing: (average(other, prompt), nothing),
    "the concept in the negative": lambda prompt, other, nothing: (nothing, prompt),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_sampled_picture_is_that_of_a_unet_made_of_the_pure_function(worlds, two, applied, name):
    stock, (patched, clip) = worlds.clip("sd1"), applied
    texts = [PROMPT, "a (<b>:0.7) " + "word " * 80, ""]
    twins = [TWIN_PROMPT, "a (teddy bear:0.7) " + "word " * 80, ""]
    both = GRAPHS[name](*(worlds.encode(clip, text) for text in texts))
    plain = GRAPHS[name](*(worlds.encode(stock, text) for text in twins))
    pairs = []
    for ours, theirs in zip(both, plain, strict=True):
        for (found, _), (expected, _) in zip(ours, theirs, strict=True):
            e, t = untwined(found)
            assert torch.equal(t, expected)
            pairs.append((e, t))
    expected = worlds.sample_conds(oracle(worlds, worlds.model(FAMILY), two, pairs), *plain)
    found = worlds.sample_conds(patched, *both)
    assert_close(found, expected)
    assert not torch.allclose(found, worlds.sample_conds(worlds.model(FAMILY), *plain), atol=1e-2)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(
    "text", ["a <b>", "(<b>:1.3) and <b>, nice", "<b> " + "word " * 80 + "<b>."]
)
def test_the_conditioning_is_the_superclasss_pooled_vector_included(worlds, family, text):
    stock = worlds.clip(family)
    concept = worlds.concept(f"{family}_light", 0, "<b>")
    concept = dataclasses.replace(concept, superclass="teddy bear")
    _, clip = apply_concepts(worlds.model(f"{family}_light"), stock, [concept], "twin")
    ((found, more),) = worlds.encode(clip, text)
    ((plain, plain_more),) = worlds.encode(stock, text.replace("<b>", "teddy bear"))
    assert isinstance(found, TwinEncoding)
    assert torch.equal(found.as_subclass(torch.Tensor), plain)
    assert torch.equal(more["pooled_output"], plain_more["pooled_output"])
    prompt, twin = untwined(found)
    # What stands before the last sub-word of the first placeholder is the same in both.
    first = stock.tokenize(text.replace("<b>", "teddy bear"))["g" if family == "sdxl" else "l"][0]
    bear = stock.tokenize("teddy bear")["g" if family == "sdxl" else "l"][0][2]
    at = first.index(next(each for each in first if each[0] == bear[0]))
    named = named_tokens(prompt, twin)[0]
    assert not named[:at].any()
    assert named[at]


def test_a_placeholder_at_the_end_of_a_section_moves_to_the_next_as_a_whole(worlds, two, applied):
    _, clip = applied
    words = "word " * 74
    first, second = clip.tokenize(words + "<b> here")["l"]
    assert [isinstance(token, torch.Tensor) for token, _ in first] == [False] * 77
    assert [isinstance(token, torch.Tensor) for token, _ in second[:4]] == [
        False,
        True,
        True,
        False,
    ]
    ((found, _),) = worlds.encode(clip, words + "<b> here")
    prompt, twin = untwined(found)
    assert found.shape[1] == 154
    assert named_tokens(prompt, twin)[0].nonzero()[0].item() == 77 + 2


def test_a_prompt_without_placeholders_is_an_ordinary_tensor_and_computes_nothing(
    worlds, applied, monkeypatch
):
    patched, clip = applied
    ((found, _),) = worlds.encode(clip, "a cat")
    assert type(found) is torch.Tensor
    for name in ("twin_similarities", "open_twin_gates", "twin_inputs"):
        monkeypatch.setattr(twin_inputs, name, lambda *_: pytest.fail("computed without need"))
    worlds.sample(patched, clip, "a cat", 1)


def test_gates_are_computed_once_per_model_call_and_keys_are_left_alone(
    worlds, applied, monkeypatch
):
    patched, clip = applied
    calls = []

    def counted(*args):
        calls.append(args)
        return open_twin_gates(*args)

    monkeypatch.setattr(twin_inputs, "open_twin_gates", counted)
    worlds.sample(patched, clip, PROMPT, 3)
    assert len(calls) == 3
    for layer in cross_attentions(patched.model):
        assert "forward" not in vars(layer.to_k)
        shared = layer.to_v.forward.active.shared
        assert shared.encodings is shared.inputs is shared.gates is None


def test_strength_0_reads_as_the_superclass(worlds, two):
    model, stock = worlds.model(FAMILY), worlds.clip("sd1")
    silent = [concept.with_gate(strength=0.0) for concept in two]
    patched, clip = apply_concepts(model, stock, silent, "twin")
    expected = worlds.sample(model, stock, TWIN_PROMPT, 1)
    assert torch.equal(worlds.sample(patched, clip, PROMPT, 1), expected)
    # Beside one that speaks it is the everyday word in both encodings.
    one, clip = apply_concepts(model, stock, [two[0], silent[1]], "twin")
    alone, clip_alone = apply_concepts(model, stock, two[:1], "twin")
    found = worlds.sample(one, clip, PROMPT, 1)
    text = "a <a> and (teddy bear:1.3), on the beach"
    assert torch.equal(found, worlds.sample(alone, clip_alone, text, 1))


def test_schedules_may_differ_and_outside_of_them_it_is_the_superclass(worlds, two):
    model, stock = worlds.model(FAMILY), worlds.clip("sd1")

    def plan(concept, start, end, blocks=()):
        return concept.with_schedule(GateSchedule(start, end, (-1.0, -1.0), (0.2, 0.2), blocks))

    never = [plan(two[0], 0.501, 0.502), plan(two[1], 0.503, 0.504)]
    patched, clip = apply_concepts(model, stock, never, "twin")
    expected = worlds.sample(model, stock, TWIN_PROMPT, 2)
    assert torch.equal(worlds.sample(patched, clip, PROMPT, 2), expected)
    # All the time, but in different places of the model.
    split = [plan(two[0], 0, 1, ("down",)), plan(two[1], 0, 1, ("up",))]
    patched, clip = apply_concepts(model, stock, split, "twin")
    pairs = [untwined(worlds.encode(clip, text)[0][0]) for text in (PROMPT, "")]
    acting = {"<a>": "input_blocks", "<b>": "output_blocks"}
    model_of = oracle(worlds, model, two, pairs, lambda n, c: n.startswith(acting[c.placeholder]))
    assert_close(worlds.sample(patched, clip, PROMPT), worlds.sample(model_of, stock, TWIN_PROMPT))
