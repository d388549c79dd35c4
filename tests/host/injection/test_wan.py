"""Concepts on Wan: models from pictures, and two experts that take turns."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from comfy import model_patcher
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.text.twin import untwined

from tests.host.cross_models import (
    CPU,
    CROSS,
    base_of,
    build_cross,
    randomise,
)
from tests.host.cross_oracle import (
    PROMPT,
    READS_AS,
    close_to,
    oracle,
    read_pairs,
)

pytestmark = pytest.mark.usefixtures("narrow")


def image_to_video():
    """A small Wan that reads pictures as well, always the same."""
    base = base_of("wan", {**CROSS["wan"].unet, "model_type": "i2v"}, CPU)
    randomise(base.diffusion_model, 0)
    return model_patcher.CoreModelPatcher(base, load_device=CPU, offload_device=CPU)


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
