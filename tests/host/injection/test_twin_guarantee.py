"""Twin lock's guarantee, to the last bit: a prompt that names no concept is the base model's.

Beside a prompt that does name one, in the same batch: with every sampler, and on every transformer
in every precision (UNets: test_twin_lock).
"""

from __future__ import annotations

import functools

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.text.twin import TwinEncoding

from tests.host.cross_models import CROSS, build_cross, narrow_families
from tests.host.first_step import seen_rows

NAMED, READS_AS = "a photo of a <a> in the snow", "a photo of a cat in the snow"
NAMELESS = "a small mug in a garden"
# It measures its steps by all pictures of a batch, whatever their prompts.
BY_THE_WHOLE_BATCH = {"dpm_adaptive"}


@pytest.fixture(scope="module")
def unet(worlds):
    """A small UNet and CLIP, plain and with a concept whose gate stands open for any word."""
    model, clip = worlds.model("small"), worlds.clip("sd1")
    concept = worlds.fitting_concept(model, clip, 0, "<a>", bias=-5.0)
    return (model, clip), apply_concepts(model, clip, [concept], "twin")


def two_prompts(worlds, clip, first, second):
    """One conditioning whose rows are two prompts."""
    one, other = (worlds.encode(clip, text)[0] for text in (first, second))
    pooled = torch.cat([each[1]["pooled_output"] for each in (one, other)])
    return [[torch.cat([one[0], other[0]]), {**one[1], "pooled_output": pooled}]]


def sampled(model, positive, negative, sampler):
    with torch.inference_mode():
        latent = torch.zeros(2, 4, 8, 8)
        noise = comfy.sample.prepare_noise(latent, 0)
        return comfy.sample.sample(
            *(model, noise, 3, 2.0, sampler, "normal", positive, negative, latent),
            disable_pbar=True,
            seed=0,
        )


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_with_every_sampler_a_picture_beside_one_that_names_a_concept_is_the_base_models(
    worlds, unet, sampler
):
    (model, clip), (patched, knowing) = unet
    alone = sampler in BY_THE_WHOLE_BATCH
    rows = (NAMELESS, NAMELESS) if alone else (NAMED, NAMELESS)
    reads_as = (NAMELESS, NAMELESS) if alone else (READS_AS, NAMELESS)
    prompts = two_prompts(worlds, knowing, *rows)
    assert isinstance(prompts[0][0], TwinEncoding) != alone
    found = sampled(patched, prompts, worlds.encode(knowing, ""), sampler)
    base = sampled(model, two_prompts(worlds, clip, *reads_as), worlds.encode(clip, ""), sampler)
    assert torch.isfinite(base).all()
    assert torch.equal(found[1], base[1])
    assert alone or not torch.allclose(found[0], base[0], atol=1e-2 * float(base.abs().max()))


@pytest.fixture(scope="module", autouse=True)
def _narrow():
    with narrow_families():
        yield


@pytest.fixture(scope="module")
def transformers(worlds):
    """By name: a small MODEL and CLIP, plain and with a concept; built once."""

    @functools.cache
    def build(name):
        model, clip = build_cross(name), CROSS[name].clip()
        concept = worlds.fitting_concept(model, clip, 0, "<a>", bias=-5.0)
        return model, clip, concept

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CROSS)
def test_on_every_transformer_a_negative_beside_a_prompt_that_names_a_concept_is_the_base_models(
    worlds, transformers, name, dtype
):
    stock, clip, concept = transformers(name)
    model = stock.clone()
    model.set_model_compute_dtype(dtype)
    patched, knowing = apply_concepts(model, clip, [concept], "twin")
    named, nameless = (worlds.encode(knowing, text) for text in (NAMED, NAMELESS))
    reads_as, plain = (worlds.encode(clip, text) for text in (READS_AS, NAMELESS))
    latent = CROSS[name].latent
    found, beside = rows_of(patched, named, nameless, latent)
    base, base_beside = rows_of(model, reads_as, plain, latent)
    assert torch.isfinite(base_beside).all()
    assert torch.equal(beside, base_beside)
    assert not torch.equal(found, base)
    # And the other way round: the negative names it.
    beside, _ = rows_of(patched, nameless, named, latent)
    assert torch.equal(beside, rows_of(model, plain, reads_as, latent)[0])


def rows_of(model, positive, negative, shape):
    """What the model gives for either conditioning at the first step, from one call of it."""
    latent = torch.zeros(shape)
    noise = comfy.sample.prepare_noise(latent, 0)

    def sample(clone):
        with torch.inference_mode():
            comfy.sample.sample(
                *(clone, noise, 1, 2.0, "euler", "simple", positive, negative, latent),
                disable_pbar=True,
                seed=0,
            )

    return seen_rows(model, sample)
