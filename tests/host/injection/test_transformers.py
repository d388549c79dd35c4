"""Concepts on transformers with a text cross-attention of their own: what UNets do, they do too.

A further family is a row of `FAMILIES` and one of `tests/host/cross_models.py`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from types import SimpleNamespace

import comfy.model_management
import comfy.sample
import comfy.supported_models as supported
import pytest
import torch
from comfy import model_base, model_patcher
from comfy.ldm.hydit import models as hydit
from comfy.ldm.kandinsky5 import model as kandinsky5
from comfy.ldm.lightricks import av_model
from comfy.ldm.wan import model as wan
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import (
    UnsupportedModelError,
    cross_attentions,
    family_of,
    family_of_clip,
)
from comfyui_perfusion.host.models.networks import FusedPart, why_not
from comfyui_perfusion.host.text.marked_words import takes_place_of
from comfyui_perfusion.host.text.twin import untwined
from comfyui_perfusion.perfusion import GateSchedule, edit_projection, load_concept, save_concept
from comfyui_perfusion.perfusion.gated.twin_lock import twin_gates, twin_inputs
from torch.nn import functional

from tests.host.cross_models import (
    CPU,
    CROSS,
    META,
    base_of,
    build_cross,
    full_size,
    narrow_families,
    randomise,
    real_families,
)

PROMPT = "a photo of a <a>, and a (<b>:1.3) in the snow"
READS_AS = "a photo of a mug, and a (blue bag:1.3) in the snow"
NAMELESS = "a small cat in a garden"
# Sums of some thousand products in fp32, relative to the largest value.
CLOSE = {"rtol": 0, "atol": 2e-4}


class Small:
    """A family's small MODEL and CLIP, and two concepts with open gates."""

    def __init__(self, name, worlds):
        self.name = name
        self.row = CROSS[name]
        self.model = build_cross(name)
        self.clip = self.row.clip()
        first = self.concept(worlds, 0, "<a>", "mug")
        second = self.concept(worlds, 1, "<b>", "blue bag", strength=0.7)
        self.concepts = first, dataclasses.replace(second, twin_locked=True)

    def concept(self, worlds, seed, placeholder, superclass, **changes):
        changes = {"bias": -1.0, **changes}
        found = worlds.fitting_concept(self.model, self.clip, seed, placeholder, **changes)
        return dataclasses.replace(found, superclass=superclass)

    def sample(self, model, positive, negative, steps=2):
        with torch.inference_mode():
            latent = torch.zeros(self.row.latent)
            noise = comfy.sample.prepare_noise(latent, 0)
            return comfy.sample.sample(
                *(model, noise, steps, 2.0, "euler", "simple", positive, negative, latent),
                disable_pbar=True,
                seed=0,
            )


@pytest.fixture(scope="module", autouse=True)
def _narrow():
    with narrow_families():
        yield


@pytest.fixture(scope="module")
def smalls(worlds):
    """Each family's small models, built once."""
    return functools.cache(lambda name: Small(name, worlds))


@pytest.fixture(params=CROSS)
def small(request, smalls):
    return smalls(request.param)


def image_to_video():
    """A small Wan that reads pictures as well, always the same."""
    base = base_of("wan", {**CROSS["wan"].unet, "model_type": "i2v"}, CPU)
    randomise(base.diffusion_model, 0)
    return model_patcher.CoreModelPatcher(base, load_device=CPU, offload_device=CPU)


def rows_of(layer):
    """The weights and biases of a layer's keys and values."""
    found = []
    for part in (layer.to_k, layer.to_v):
        module = part.module if isinstance(part, FusedPart) else part
        rows = slice(part.start, part.stop) if isinstance(part, FusedPart) else slice(None)
        bias = None if module.bias is None else module.bias[rows]
        found.append((module.weight[rows], bias))
    return found


def replace_projections(model, keys, values):
    """Let a model of its own project by functions of (layer's name, weight, bias, what is read)."""
    for layer in cross_attentions(model.model):
        (k, k_bias), (v, v_bias) = rows_of(layer)
        key = functools.partial(keys, layer.name, k, k_bias)
        value = functools.partial(values, layer.name, v, v_bias)
        if len(layer.modules) == 1:
            layer.modules[0].forward = lambda x, key=key, value=value: torch.cat(
                [key(x), value(x)], -1
            )
        else:
            layer.to_k.forward, layer.to_v.forward = key, value
    return model


def plain(name, weight, bias, context):
    return functional.linear(context, weight, bias)


def close_to(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, **CLOSE)


def oracle(small, concepts, pairs, pure=None):
    """A model that reads twins, its values the pure function of a table of (e, t), (1, N, D)."""
    pure = pure or build_cross(small.name)
    entry = family_of(pure.model).network.entry
    network = pure.model.diffusion_model

    def read_of(encodings):
        return encodings if entry is None else network.get_submodule(entry)(encodings)

    def pair_of(row):
        for prompt, twin in pairs:
            read = read_of(twin)[0]
            if read.shape == row.shape and torch.allclose(read, row, atol=1e-5):
                return prompt, twin
        raise AssertionError("the model reads something else than a twin")

    def values(name, weight, bias, context):
        outputs = torch.stack([concept.o_v[name] for concept in concepts])
        found = []
        for row in context:
            prompt, twin = pair_of(row)
            gates = twin_gates(prompt, twin, [c.twin_direction() for c in concepts])[0]
            found.append(functional.linear(twin_inputs(row, gates), weight, bias) + gates @ outputs)
        return torch.stack(found)

    return replace_projections(pure, plain, values)


@pytest.mark.parametrize("name", CROSS)
def test_the_published_model_is_detected_and_its_layers_are_found(name):
    with real_families():
        model = full_size(name)
        layers = cross_attentions(model)
        assert family_of(model).name == name
    assert (len(layers), {layer.value_width for layer in layers}) == (
        CROSS[name].layers[0],
        {CROSS[name].layers[1]},
    )
    assert {layer.key_width for layer in layers} == {CROSS[name].layers[1]}


def test_the_text_encoder_tells_its_family(small):
    family = family_of(small.model.model)
    assert family.name == small.name
    assert family.owns(small.clip)
    # PixArt-Alpha and -Sigma have the same.
    assert family_of_clip(small.clip).network is family.network


def test_the_prompt_reads_as_its_superclass_token_for_token(small, worlds):
    _, clip = apply_concepts(small.model, small.clip, small.concepts, "twin")
    for text, reads_as in ((PROMPT, READS_AS), ("<b>", "blue bag"), ("(<a>)!", "(mug)!")):
        ((found, more),) = worlds.encode(clip, text)
        ((expected, plain_more),) = worlds.encode(small.clip, reads_as)
        prompt, twin = untwined(found)
        assert torch.equal(twin, expected)
        assert prompt.shape == twin.shape
        assert not torch.equal(prompt, twin)
        for key, value in plain_more.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(more[key], value)


def test_a_sampled_picture_is_that_of_the_pure_function(small, worlds):
    patched, clip = apply_concepts(small.model, small.clip, small.concepts, "twin")
    both = [worlds.encode(clip, text) for text in (PROMPT, "")]
    stock = [worlds.encode(small.clip, text) for text in (READS_AS, "")]
    found = small.sample(patched, *both)
    pairs = read_pairs(small, clip, (PROMPT, ""))
    close_to(found, small.sample(oracle(small, small.concepts, pairs), *stock))
    bare = small.sample(small.model, *stock)
    assert not torch.allclose(found, bare, atol=1e-2 * float(bare.abs().max()))


def test_a_prompt_that_names_no_concept_gives_the_base_models_picture_to_the_last_bit(
    small, worlds
):
    before = worlds.state(small.model)
    patched, clip = apply_concepts(small.model, small.clip, small.concepts, "twin")
    known = [worlds.encode(clip, text) for text in (NAMELESS, "")]
    stock = [worlds.encode(small.clip, text) for text in (NAMELESS, "")]
    expected = small.sample(small.model, *stock)
    assert torch.equal(small.sample(patched, *known), expected)
    # Neither is it changed by a sampling that names them.
    named = small.sample(patched, worlds.encode(clip, PROMPT), known[1])
    assert torch.equal(small.sample(patched, *known), expected)
    assert torch.equal(small.sample(patched, worlds.encode(clip, PROMPT), known[1]), named)
    comfy.model_management.unload_all_models()
    assert worlds.same(worlds.state(small.model), before)
    for layer in cross_attentions(small.model.model):
        assert not any("forward" in vars(module) for module in layer.modules)


def test_strength_and_schedule_are_each_concepts_own(small, worlds):
    first, second = small.concepts
    clips = worlds.encode(small.clip, READS_AS), worlds.encode(small.clip, "")
    silent = [concept.with_gate(strength=0.0) for concept in small.concepts]
    patched, clip = apply_concepts(small.model, small.clip, silent, "twin")
    named = [worlds.encode(clip, text) for text in (PROMPT, "")]
    assert torch.equal(small.sample(patched, *named), small.sample(small.model, *clips))
    never = second.with_schedule(GateSchedule(0.501, 0.502, (-1.0, -1.0), (0.2, 0.2), ()))
    patched, clip = apply_concepts(small.model, small.clip, [first, never], "twin")
    named = [worlds.encode(clip, text) for text in (PROMPT, "")]
    pairs = read_pairs(small, clip, (PROMPT, ""))
    expected = small.sample(oracle(small, [first], pairs), *clips)
    close_to(small.sample(patched, *named), expected)


def test_other_key_locks_are_the_pure_function_or_refused_by_name(small, worlds):
    concepts = [dataclasses.replace(each, twin_locked=False) for each in small.concepts]
    for lock in ("local", "global"):
        if lock not in small.row.locks:
            with pytest.raises(ValueError, match=f"{family_of(small.model.model).label}.*{lock}"):
                apply_concepts(small.model, small.clip, concepts, lock)
            continue
        patched, clip = apply_concepts(small.model, small.clip, concepts, lock)
        both = [worlds.encode(clip, text) for text in (PROMPT, "")]
        found = small.sample(patched, *both)
        pairs = read_pairs(small, clip, (PROMPT, ""))
        directions = [concept.direction() for concept in concepts]

        def keys(name, weight, bias, context, lock=lock, directions=directions, pairs=pairs):
            if lock == "local":
                outputs = [weight @ concept.superclass_encoding for concept in concepts]
                return edit_projection(weight, context, directions, torch.stack(outputs))
            twins = [
                next(twin for prompt, twin in pairs if torch.allclose(prompt[0], row, atol=1e-5))
                for row in context
            ]
            return functional.linear(torch.cat(twins), weight, bias)

        def values(name, weight, bias, context, directions=directions):
            outputs = torch.stack([concept.o_v[name] for concept in concepts])
            return edit_projection(weight, context, directions, outputs)

        pure = replace_projections(build_cross(small.name), keys, values)
        # What is read as it is, through no adapter any more.
        prompts = [
            [[prompt, {key: value for key, value in each[0][1].items() if "t5xxl" not in key}]]
            for (prompt, _), each in zip(pairs, both, strict=True)
        ]
        close_to(found, small.sample(pure, *prompts))


def test_a_concept_file_names_its_family_and_is_refused_by_another(small, smalls, worlds, tmp_path):
    file = save_concept(small.concepts[0], tmp_path / "concept.safetensors", torch.float32)
    concept = load_concept(file)
    assert concept.family == small.name
    other = smalls(next(name for name in CROSS if name != small.name))
    label, theirs = (family_of(each.model.model).label for each in (small, other))
    with pytest.raises(ValueError, match=f"trained for {label}, the model is {theirs}"):
        apply_concepts(other.model, other.clip, [concept], "twin")
    with pytest.raises(ValueError, match=f"trained for {label}, the model is Stable Diffusion 1"):
        apply_concepts(worlds.model("sd1_light"), worlds.clip("sd1"), [concept], "twin")
    loaded = apply_concepts(small.model, small.clip, [concept], "twin")
    assert torch.equal(
        worlds.encode(loaded[1], "a <a>")[0][0].as_subclass(torch.Tensor),
        worlds.encode(small.clip, "a mug")[0][0],
    )


def test_tokens_of_pictures_keep_projections_of_their_own(smalls, worlds):
    """Wan's models from pictures put those of CLIP vision in front of the text's."""
    small = smalls("wan")
    model, pure = (image_to_video() for _ in range(2))
    patched, clip = apply_concepts(model, small.clip, small.concepts, "twin")
    seen = SimpleNamespace(penultimate_hidden_states=torch.randn(1, 257, 1280))
    both, stock = (
        [
            [
                [cond, {**more, "clip_vision_output": seen}]
                for cond, more in worlds.encode(words, text)
            ]
            for text in (prompt, "")
        ]
        for words, prompt in ((clip, PROMPT), (small.clip, READS_AS))
    )
    found = small.sample(patched, *both)
    pairs = read_pairs(small, clip, (PROMPT, ""))
    close_to(found, small.sample(oracle(small, small.concepts, pairs, pure), *stock))
    for block in model.model.diffusion_model.blocks:
        for module in (block.cross_attn.k_img, block.cross_attn.v_img):
            assert "_perfusion_dispatcher" not in vars(module)


def test_each_of_two_experts_carries_a_concept_of_its_own(smalls, worlds):
    """Wan 2.2: two models that take turns, one prompt for both."""
    small = smalls("wan")
    experts = build_cross("wan", 0), build_cross("wan", 5)
    first = small.concepts[0]
    random = torch.Generator().manual_seed(9)
    values = {name: torch.randn(row.shape, generator=random) for name, row in first.o_v.items()}
    concepts = first, dataclasses.replace(first, o_v=values)
    applied = [
        apply_concepts(expert, small.clip, [concept], "twin")
        for expert, concept in zip(experts, concepts, strict=True)
    ]
    # Either CLIP does.
    prompts = [[worlds.encode(clip, text) for text in ("a <a>", "")] for _, clip in applied]
    assert torch.equal(untwined(prompts[0][0][0][0])[0], untwined(prompts[1][0][0][0])[0])
    stock = [worlds.encode(small.clip, text) for text in ("a mug", "")]
    pairs = read_pairs(small, applied[0][1], ("a <a>", ""))
    for seed, (patched, _), concept in zip((0, 5), applied, concepts, strict=True):
        pure = oracle(small, [concept], pairs, build_cross("wan", seed))
        close_to(small.sample(patched, *prompts[0]), small.sample(pure, *stock))


NOT_YET = {
    "Kandinsky5": (supported.Kandinsky5, model_base.Kandinsky5, kandinsky5.Kandinsky5),
    "HunyuanDiT": (supported.HunyuanDiT, model_base.HunyuanDiT, hydit.HunYuanDiT),
    "WAN21_Vace": (supported.WAN21_Vace, model_base.WAN21_Vace, wan.VaceWanModel),
    "LTXAV": (supported.LTXAV, model_base.LTXAV, av_model.LTXAVModel),
}


@pytest.mark.parametrize("name", NOT_YET)
def test_what_cannot_be_edited_is_refused_by_name_with_the_reason(name):
    config, base, network = NOT_YET[name]
    model = base(
        config({"image_model": "", "disable_unet_model_creation": True}),
        device=torch.device("meta"),
    )
    # The class alone tells.
    model.diffusion_model = network.__new__(network)
    with pytest.raises(UnsupportedModelError) as refused:
        family_of(model)
    assert str(refused.value).startswith(name)
    assert why_not(model.diffusion_model) in str(refused.value)
    assert len(why_not(model.diffusion_model)) > 40


def test_layers_that_rescale_the_text_at_every_step_are_refused(smalls):
    model = base_of("ltxv", {**CROSS["ltxv"].unet, "cross_attention_adaln": True}, META)
    with pytest.raises(UnsupportedModelError, match=r"LTXV.*in every layer at every step"):
        family_of(model)


def test_a_clip_of_another_family_is_refused(small, worlds):
    label = family_of(small.model.model).label
    with pytest.raises(ValueError, match=f"does not belong to {label}"):
        apply_concepts(small.model, worlds.clip("sd1"), small.concepts, "twin")


def read_pairs(small, clip, texts):
    """(e, t) of prompts, as the model is called with them."""
    pairs = []
    for text in texts:
        for cond, more in encoded(clip, text):
            pair = untwined(cond)
            adapts = family_of(small.model.model).network.adapts
            pairs.append(adapted(small, clip.tokenize(text), pair, more) if adapts else pair)
    return pairs


def adapted(small, tokens, pair, more):
    """A prompt and its twin through a copy of Anima's adapter whose table has a row for each."""
    adapter = copy.deepcopy(small.model.model.diffusion_model.llm_adapter)
    table = adapter.embed.weight
    rows, ids = [], [more["t5xxl_ids"].clone(), more["t5xxl_ids"].clone()]
    for at, (token, _) in enumerate(tokens["t5xxl"][0]):
        if isinstance(token, torch.Tensor):
            instead = token, table[list(takes_place_of(token))].mean(0)
            for own, row in zip(ids, instead, strict=True):
                own[at] = len(table) + len(rows)
                rows.append(row)
    adapter.embed.weight = torch.nn.Parameter(torch.cat([table, *(row[None] for row in rows)]))
    with torch.no_grad():
        found = [adapter(e, own[None]) for e, own in zip(pair, ids, strict=True)]
    found = [each * more["t5xxl_weights"][None, :, None] for each in found]
    return tuple(functional.pad(each, (0, 0, 0, 512 - each.shape[1])) for each in found)


def encoded(clip, text):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))
