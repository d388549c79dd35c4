"""Images, their sizes, versions, captions and masks, as a training goes through them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from perfusion.gated.rank_one import GatedProjections
from perfusion.text.prompts import fill
from perfusion.training.denoiser import Batch, Conditioning
from perfusion.training.run import train_concept
from tests.method.tiny_diffusion import (
    SIDE,
    TEMPLATES,
    assert_identical,
    config,
    everything,
)


def watched_batches(denoiser) -> list[Batch]:
    """Where the batches of a training will be, in order."""
    batches: list[Batch] = []
    original = denoiser.errors

    def watched(batch: Batch, encoded: Conditioning, edit: GatedProjections | None) -> Tensor:
        batches.append(batch)
        return original(batch, encoded, edit)

    denoiser.errors = watched
    return batches


def test_masked_pixels_teach_nothing(denoiser, covariance):
    masks = torch.zeros(5, 1, SIDE, SIDE)
    masks[..., :2] = 1
    denoiser.mask_maps = masks
    expected = train_concept(denoiser, config(), covariance)
    # Each pixel of this network sees only itself, so other pixels outside the mask change nothing.
    denoiser.images = torch.where(masks.bool(), denoiser.images, torch.full((), 5.0))
    assert_identical(train_concept(denoiser, config(), covariance), expected)
    floor = train_concept(denoiser, config(background=0.5), covariance)
    assert floor.losses != expected.losses


def test_every_image_gets_its_turn_and_timesteps_cover_the_schedule(denoiser, covariance):
    batches = watched_batches(denoiser)
    train_concept(denoiser, config(batch_size=7), covariance)
    for batch in batches:
        assert set(batch.indices.tolist()) == set(range(5))
        assert (batch.timesteps * 7).long().tolist() == list(range(7))
        assert float(batch.timesteps.max()) < 1


def test_rows_computed_apart_make_the_same_step(denoiser, covariance):
    whole = train_concept(denoiser, config(batch_size=7), covariance)
    apart = train_concept(denoiser, config(batch_size=7, rows_at_once=3), covariance)
    for ours, theirs in zip(everything(apart), everything(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_images_of_different_sizes_are_computed_apart_and_all_count(denoiser, covariance):
    denoiser.widths = {1: 2, 3: 2}
    shapes: list[tuple[set[int], int]] = []
    original = denoiser.errors

    def watched(batch: Batch, encoded: Conditioning, edit: GatedProjections | None) -> Tensor:
        errors = original(batch, encoded, edit)
        shapes.append(({denoiser.shape(n)[1] for n in batch.indices.tolist()}, errors.shape[-1]))
        return errors

    denoiser.errors = watched  # type: ignore[method-assign]
    result = train_concept(denoiser, config(batch_size=5, steps=2), covariance)
    assert sorted((*sizes, width) for sizes, width in shapes) == [(2, 2)] * 2 + [(4, 4)] * 2
    assert bool((result.record.losses > 0).all())


def test_each_image_is_learned_with_its_own_caption(denoiser, covariance):
    seen: list[tuple[int, str]] = []
    encode, errors = denoiser.encode, denoiser.errors
    prompts: list[str] = []

    def encoding(texts: Sequence[str], embeddings: Mapping[str, Tensor]) -> Conditioning:
        prompts[:] = texts
        return encode(texts, embeddings)

    def watched(batch: Batch, encoded: Conditioning, edit: GatedProjections | None) -> Tensor:
        seen.extend(zip(batch.indices.tolist(), prompts, strict=True))
        return errors(batch, encoded, edit)

    denoiser.encode = encoding  # type: ignore[method-assign]
    denoiser.errors = watched  # type: ignore[method-assign]
    captions = ("a {}", "a photo of a {}", "the {}", "my {}", "one {}")
    concept = train_concept(denoiser, config(captions=captions), covariance).concept
    assert len(seen) == 24
    assert {(n, fill(captions[n], "sks")) for n in range(5)} == set(seen)
    assert json.loads(concept.metadata["training"])["captions"] == list(captions)
    with pytest.raises(ValueError, match="each of the 5 images, found 4 captions"):
        train_concept(denoiser, config(captions=captions[:4]), covariance)


def test_a_sentence_drawn_twice_is_encoded_once(denoiser, covariance):
    encoded: list[int] = []
    original = denoiser.encode

    def watched(prompts: Sequence[str], embeddings: Mapping[str, Tensor]) -> Conditioning:
        assert len(set(prompts)) == len(prompts)
        encoded.append(len(prompts))
        return original(prompts, embeddings)

    denoiser.encode = watched  # type: ignore[method-assign]
    train_concept(denoiser, config(batch_size=9), covariance)
    assert max(encoded) <= len(TEMPLATES)


def test_every_variant_is_seen_and_noise_does_not_depend_on_the_grouping(denoiser, covariance):
    denoiser.variant_count = 2
    batches = watched_batches(denoiser)
    train_concept(denoiser, config(), covariance)
    assert {v for batch in batches for v in batch.variants.tolist()} == {0, 1}
    noise = batches[0].noise(3, 4, 4)
    one = batches[0].rows(torch.tensor([2])).noise(3, 4, 4)
    assert torch.equal(noise[2], one[0])
    seeds = torch.cat([batch.seeds for batch in batches])
    assert len(seeds.unique()) == len(seeds)
