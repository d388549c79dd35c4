"""Global key lock: keys of the prompt with the superclass words, whatever the graph does to it."""

from __future__ import annotations

import copy
import dataclasses
import functools

import comfy.hooks
import comfy.model_base
import pytest
import torch
from comfy_extras.nodes_hooks import SetClipHooks
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import cross_attentions
from comfyui_perfusion.host.text.placeholders import with_placeholders
from comfyui_perfusion.host.text.twin import TwinEncoding, untwined, with_twin
from comfyui_perfusion.perfusion import GateSchedule

import nodes as comfy_nodes

PROMPT = "a <a> and <b>, on the (beach:1.2)"
TWIN_PROMPT = "a cat and cat, on the (beach:1.2)"
WORDS = frozenset({"<a>"})
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@pytest.fixture(scope="module")
def two(worlds):
    """Two concepts of SD1.x, both kinds of cats."""
    return worlds.concept("sd1_light", 0, "<a>"), worlds.concept("sd1_light", 1, "<b>")


@pytest.fixture(scope="module")
def applied(worlds, two):
    """MODEL and CLIP with both concepts and global key lock."""
    return apply_concepts(worlds.model("sd1_light"), worlds.clip("sd1"), two, "global")


def assert_close(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, **CLOSE)


def oracle(worlds, model, concepts, pairs):
    """A UNet whose values are the pure function and whose keys are those of the twins in a table.

    `pairs` holds (encodings, twins), each (1, N, D), made without the code under test.
    """
    pure = worlds.pure(model, concepts)

    def keys(weight, encodings):
        rows = []
        for row in encodings:
            # ComfyUI repeats a shorter conditioning to the length of a longer one.
            twin = next(
                t[0].repeat(len(row) // e.shape[1], 1)
                for e, t in pairs
                if len(row) % e.shape[1] == 0
                and torch.equal(e[0].repeat(len(row) // e.shape[1], 1), row)
            )
            rows.append(twin)
        return torch.nn.functional.linear(torch.stack(rows), weight)

    for layer in cross_attentions(pure.model):
        layer.to_k.forward = functools.partial(keys, layer.to_k.weight)
    return pure


def count_calls(monkeypatch):
    """The number of rows of each model call from now on."""
    calls = []
    original = comfy.model_base.BaseModel._apply_model

    def counted(self, x, *args, **kwargs):
        calls.append(x.shape[0])
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(comfy.model_base.BaseModel, "_apply_model", counted)
    return calls


def mask():
    return torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], dim=2)


def concat(first, second):
    return comfy_nodes.ConditioningConcat().concat(first, second)[0]


def average(first, second):
    return comfy_nodes.ConditioningAverage().addWeighted(first, second, 0.3)[0]


def masked(cond):
    return comfy_nodes.ConditioningSetMask().append(cond, mask(), "default", 0.8)[0]


def in_area(cond):
    return comfy_nodes.ConditioningSetArea().append(cond, 32, 64, 0, 0, 1.0)[0]


def in_range(cond, start, end):
    return comfy_nodes.ConditioningSetTimestepRange().set_range(cond, start, end)[0]


def zeroed(cond):
    return comfy_nodes.ConditioningZeroOut().zero_out(cond)[0]


# name -> (positive, negative) of the conditionings of the prompt, another prompt and nothing.
GRAPHS = {
    "plain": lambda prompt, other, nothing: (prompt, nothing),
    "combine": lambda prompt, other, nothing: (prompt + other, nothing),
    "concat": lambda prompt, other, nothing: (concat(prompt, other), nothing),
    "concat of a prompt without it": lambda prompt, other, nothing: (
        concat(nothing, prompt),
        nothing,
    ),
    "average": lambda prompt, other, nothing: (average(prompt, other), nothing),
    "average with a prompt without it": lambda prompt, other, nothing: (
        average(nothing, prompt),
        nothing,
    ),
    "timestep range": lambda prompt, other, nothing: (
        in_range(prompt, 0.0, 0.4) + in_range(other, 0.4, 1.0),
        nothing,
    ),
    "mask": lambda prompt, other, nothing: (masked(prompt) + other, nothing),
    "area": lambda prompt, other, nothing: (in_area(prompt) + other, nothing),
    "zeroed negative": lambda prompt, other, nothing: (prompt, zeroed(other)),
    "the concept in the negative": lambda prompt, other, nothing: (other, prompt),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_whatever_a_graph_does_to_the_prompt_is_done_to_its_twin(
    worlds, two, applied, name, monkeypatch
):
    stock = worlds.clip("sd1")
    patched, clip = applied
    local = with_placeholders(stock, two)
    prompts = [PROMPT, "a (<b>:0.7) " + "word " * 80, ""]
    twins = [TWIN_PROMPT, "a (cat:0.7) " + "word " * 80, ""]
    build = GRAPHS[name]
    plain = build(*(worlds.encode(local, text) for text in prompts))
    twin = build(*(worlds.encode(stock, text) for text in twins))
    pairs = [
        (e, t) for side in (0, 1) for (e, _), (t, _) in zip(plain[side], twin[side], strict=True)
    ]
    expected_calls = count_calls(monkeypatch)
    expected = worlds.sample_conds(oracle(worlds, worlds.model("sd1_light"), two, pairs), *plain)
    assert expected_calls
    calls = count_calls(monkeypatch)
    expected_calls = list(expected_calls)
    found = worlds.sample_conds(patched, *build(*(worlds.encode(clip, t) for t in prompts)))
    assert_close(found, expected)
    assert calls == expected_calls, "positive and negative no longer share their model calls"


def test_positive_and_negative_run_as_one_batch(worlds, applied, monkeypatch):
    patched, clip = applied
    calls = count_calls(monkeypatch)
    worlds.sample(patched, clip, PROMPT, 3)
    assert calls == [2, 2, 2]
    # Also with a negative prompt of the text encoder without concepts.
    del calls[:]
    negative = worlds.encode(worlds.clip("sd1"), "bad")
    worlds.sample_conds(patched, worlds.encode(clip, PROMPT), negative, 3)
    assert calls == [2, 2, 2]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_first_encoding_is_the_stock_one_and_the_twin_that_of_the_superclass(worlds, family):
    stock = worlds.clip(family)
    concept = worlds.concept(f"{family}_light", 0, "<a>")
    model = worlds.model(f"{family}_light")
    _, clip = apply_concepts(model, stock, [concept], "global")
    for skip in (None, -2):
        for each in (stock, clip):
            each.clip_layer(skip)
        local = with_placeholders(stock, [concept])
        for text in ("a <a>", "(<a>:1.3) and <a>", "word " * 80 + "<a>."):
            ((found, extra),) = worlds.encode(clip, text)
            ((plain, plain_extra),) = worlds.encode(local, text)
            ((superclass, _),) = worlds.encode(stock, text.replace("<a>", "cat"))
            first, twin = untwined(found)
            assert torch.equal(first, plain)
            assert torch.equal(twin, superclass)
            assert torch.equal(extra["pooled_output"], plain_extra["pooled_output"])
    stock.clip_layer(None)


@pytest.mark.parametrize("family", ["sd2_light", "sdxl_light"])
def test_other_families_sample_with_the_keys_of_the_twin(worlds, family):
    stock = worlds.clip(family)
    concepts = [worlds.concept(family, 0, "<a>"), worlds.concept(family, 1, "<b>")]
    model = worlds.model(family)
    patched, clip = apply_concepts(model, stock, concepts, "global")
    local = with_placeholders(stock, concepts)
    texts = [(PROMPT, TWIN_PROMPT), ("", "")]
    pairs = [(worlds.encode(local, a)[0][0], worlds.encode(stock, b)[0][0]) for a, b in texts]
    expected = worlds.sample(oracle(worlds, model, concepts, pairs), local, PROMPT)
    found = worlds.sample(patched, clip, PROMPT)
    assert_close(found, expected)
    assert not torch.allclose(
        found, worlds.sample(apply_concepts(model, stock, concepts)[0], local, PROMPT), atol=1e-2
    )


def test_a_prompt_without_placeholders_is_encoded_once_and_is_an_ordinary_tensor(worlds, applied):
    _, clip = applied
    ((found, _),) = worlds.encode(clip, "a cat on the beach")
    assert type(found) is torch.Tensor
    ((expected, _),) = worlds.encode(worlds.clip("sd1"), "a cat on the beach")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("key_lock", ["local", "global"])
def test_a_controlnet_reads_the_everyday_word_in_the_same_batch(worlds, two, monkeypatch, key_lock):
    control = worlds.controlnet("sd1_light", 4)
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    stock = worlds.clip("sd1")
    patched, clip = apply_concepts(worlds.model("sd1_light"), stock, two, key_lock)
    read = []
    original = type(control.control_model).forward

    def forward(self, x, hint, timesteps, context, **kwargs):
        read.append(context.clone())
        return original(self, x, hint, timesteps, context, **kwargs)

    monkeypatch.setattr(type(control.control_model), "forward", forward)
    apply = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet
    # The negative comes from the text encoder without concepts.
    conds = apply(
        worlds.encode(clip, PROMPT), worlds.encode(stock, "bad"), control, hint, 0.9, 0.0, 1.0
    )
    calls = count_calls(monkeypatch)
    worlds.sample_conds(patched, *conds)
    assert calls == [2, 2]
    expected = torch.cat([worlds.encode(stock, text)[0][0] for text in (TWIN_PROMPT, "bad")])
    for found in read:
        rows = {tuple(row.flatten().tolist()) for row in found}
        assert rows == {tuple(row.flatten().tolist()) for row in expected}


def test_a_superclass_of_several_sub_words_stands_as_their_mean(worlds, two):
    concept = dataclasses.replace(two[0], **{"superclass": "teddy bear"})
    stock = worlds.clip("sd1")
    _, clip = apply_concepts(worlds.model("sd1_light"), stock, [concept], "global")
    ids = stock.tokenizer.clip_l.tokenizer("teddy bear")["input_ids"][1:-1]
    assert len(ids) > 1
    table = stock.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    mean = dataclasses.replace(concept, **{"embeddings": {"l": table[ids].mean(0).detach()}})
    expected = worlds.encode(with_placeholders(stock, [mean]), "a <a> here")[0][0]
    _, twin = untwined(worlds.encode(clip, "a <a> here")[0][0])
    torch.testing.assert_close(twin, expected)


def test_strengths_blend_the_keys_and_strength_0_leaves_them(worlds, two):
    model, stock = worlds.model("sd1_light"), worlds.clip("sd1")
    first, second = (worlds.encode(with_placeholders(stock, two), PROMPT)[0][0],) * 2
    texts = ["a cat and <b>, on the (beach:1.2)", TWIN_PROMPT]
    one, both = (worlds.encode(with_placeholders(stock, two[1:]), text)[0][0] for text in texts)

    def twin(*strengths):
        concepts = [c.with_gate(strength=w) for c, w in zip(two, strengths, strict=True)]
        _, clip = apply_concepts(model, stock, concepts, "global")
        return untwined(worlds.encode(clip, PROMPT)[0][0])[1]

    assert torch.equal(twin(1, 1), both)
    assert torch.equal(twin(0, 0), first)
    assert torch.equal(twin(1, 0), one)
    torch.testing.assert_close(twin(0.5, 0.5), first + 0.5 * (both - second))
    expected = first + 0.8 * (one - first) + 0.2 * (both - one)
    torch.testing.assert_close(twin(0.8, 0.2), expected)


def test_chaining_two_nodes_equals_one_with_both(worlds, two, applied):
    first, clip = apply_concepts(worlds.model("sd1_light"), worlds.clip("sd1"), two[:1], "global")
    chained, clip = apply_concepts(first, clip, two[1:], "global")
    assert torch.equal(worlds.sample(chained, clip, PROMPT), worlds.sample(*applied, PROMPT))


def test_the_conditioning_is_as_good_as_a_local_one_for_every_other_model(worlds, two, applied):
    model, stock = worlds.model("sd1_light"), worlds.clip("sd1")
    _, clip = applied
    local_model, local_clip = apply_concepts(model, stock, two)
    for other in (model, local_model):
        expected = worlds.sample(other, local_clip, PROMPT)
        assert torch.equal(worlds.sample(other, clip, PROMPT), expected)


def test_afterwards_model_and_text_encoder_are_what_they_were(worlds, two):
    model, stock = worlds.model("sd1_light"), worlds.clip("sd1")
    before, expected = worlds.state(model), worlds.sample(model, stock, "a cat")
    patched, clip = apply_concepts(model, stock, two, "global")
    worlds.sample(patched, clip, PROMPT)
    assert torch.equal(worlds.sample(model, stock, "a cat"), expected)
    assert worlds.same(worlds.state(model), before)
    ((found, _),) = worlds.encode(stock, PROMPT)
    assert type(found) is torch.Tensor


def test_a_patch_that_changes_the_prompt_inside_the_model_is_refused(worlds, applied):
    patched, clip = applied
    regional = patched.clone()
    regional.set_model_attn2_patch(lambda n, context, value, extra: (n, context * 1, value))
    with pytest.raises(RuntimeError, match="use local key lock with that node"):
        worlds.sample(regional, clip, PROMPT, 1)


def test_concepts_that_cannot_share_a_global_lock_are_refused(worlds, two):
    model, stock = worlds.model("sd1_light"), worlds.clip("sd1")
    keys = {name: torch.zeros_like(output) for name, output in two[0].o_v.items()}
    trained = dataclasses.replace(two[0], **{"o_k": keys})
    with pytest.raises(ValueError, match=r"'<a>' was trained with keys.*local key lock"):
        apply_concepts(model, stock, [trained], "global")
    schedule = GateSchedule(0, 0.5, (0.6, 0.6), (0.1, 0.1))
    with pytest.raises(ValueError, match="2 different schedules"):
        apply_concepts(model, stock, [two[0], two[1].with_schedule(schedule)], "global")
    local, clip = apply_concepts(model, stock, two[:1])
    with pytest.raises(ValueError, match=r"carries concepts with local.*found global"):
        apply_concepts(local, clip, two[1:], "global")


def test_tokenwise_functions_keep_the_twin_and_all_others_give_ordinary_tensors():
    first, second = torch.arange(12.0).reshape(1, 4, 3), -torch.arange(12.0).reshape(1, 4, 3)
    pair = with_twin(first, second, WORDS)
    plain = torch.ones(1, 4, 3)
    cases = [
        (torch.cat([pair, plain], 1), lambda x: torch.cat([x, plain], 1)),
        (0.3 * pair + plain * 0.7, lambda x: 0.3 * x + plain * 0.7),
        (torch.mul(pair, 2) - pair, lambda x: torch.mul(x, 2) - x),
        (pair[:, 1:3].to(torch.float64), lambda x: x[:, 1:3].double()),
        (pair.repeat(2, 1, 1).chunk(2)[1], lambda x: x),
        (torch.zeros_like(pair), torch.zeros_like),
        (copy.deepcopy(pair), lambda x: x),
    ]
    for found, expected in cases:
        assert isinstance(found, TwinEncoding)
        one, two = untwined(found)
        assert type(one) is type(two) is torch.Tensor
        assert torch.equal(one, expected(first))
        assert torch.equal(two, expected(second))
    for found in (pair @ torch.eye(3), torch.nn.functional.linear(pair, torch.eye(3)), pair.norm()):
        assert type(found) is torch.Tensor
    changed = with_twin(first.clone(), second.clone(), WORDS)
    changed *= 2
    changed[:, 0] = 5.0
    one, two = untwined(changed)
    assert torch.equal(one[:, 1:], first[:, 1:] * 2)
    assert torch.equal(two[:, 1:], second[:, 1:] * 2)
    assert (two[:, 0] == 5).all()


@pytest.mark.parametrize("scheduled", [False, True])
def test_hooks_on_the_text_encoder_reach_the_twin_too(worlds, two, applied, scheduled):
    stock, (_, clip) = worlds.clip("sd1"), applied
    key = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    lora = {
        f"{key}.lora_up.weight": torch.ones(64, 1),
        f"{key}.lora_down.weight": torch.ones(1, 768),
    }

    def encodings(clip, text):
        hooks = comfy.hooks.create_hook_lora(lora, 0.0, 1.0)
        keyframes = comfy.hooks.HookKeyframeGroup()
        keyframes.add(comfy.hooks.HookKeyframe(strength=0.3))
        keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.5))
        hooks.set_keyframes_on_hooks(keyframes)
        (hooked,) = SetClipHooks().apply_hooks(clip, scheduled, True, hooks)
        return [found for found, _ in worlds.encode(hooked, text)]

    found = encodings(clip, PROMPT)
    assert len(found) == (2 if scheduled else 1)
    plain = encodings(with_placeholders(stock, two), PROMPT)
    twins = encodings(stock, TWIN_PROMPT)
    for each, first, second in zip(found, plain, twins, strict=True):
        assert torch.equal(untwined(each)[0], first)
        assert torch.equal(untwined(each)[1], second)
    assert not torch.equal(twins[0], worlds.encode(stock, TWIN_PROMPT)[0][0])
