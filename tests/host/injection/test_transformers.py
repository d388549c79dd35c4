"""Concepts on transformers with a text cross-attention of their own: what UNets do, they do too.

A further family is a row of `FAMILIES` and one of `tests/host/cross_models.py`.
"""

from __future__ import annotations

import dataclasses

import comfy.model_management
import comfy.sample
import pytest
import torch
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import (
    cross_attentions,
    family_of,
    family_of_clip,
)
from comfyui_perfusion.host.text.twin import untwined
from comfyui_perfusion.perfusion import GateSchedule, edit_projection
from torch.nn import functional

from tests.host.cross_models import (
    CROSS,
    build_cross,
    full_size,
    real_families,
)
from tests.host.cross_oracle import (
    NAMELESS,
    PROMPT,
    READS_AS,
    close_to,
    oracle,
    read_pairs,
    replace_projections,
)

pytestmark = pytest.mark.usefixtures("narrow")


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
