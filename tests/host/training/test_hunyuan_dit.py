"""A concept learned on HunyuanDiT is known in both of its text encoders, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.second_text import joined
from comfyui_perfusion.host.pictures.training_images import TrainingImages
from comfyui_perfusion.host.text.covariance import measure_covariance
from comfyui_perfusion.host.text.twin import untwined
from comfyui_perfusion.host.training.view import training_view
from comfyui_perfusion.perfusion import train_concept
from comfyui_perfusion.perfusion.gated.rank_one import similarities
from comfyui_perfusion.perfusion.training.config import TrainingConfig

from tests.host.cross_models import CROSS, build_cross, narrow_families

CAPTIONS = ["a blue bag", "a mug on a table", "an old house in a garden", "the small cat and a dog"]
SECOND = "conditioning_mt5xl"


@pytest.fixture(scope="module")
def learned():
    """The small model, its CLIP, the covariance and a concept."""
    with narrow_families():
        model, clip = build_cross("hunyuan_dit"), CROSS["hunyuan_dit"].clip()
        covariance = measure_covariance(clip, CAPTIONS)
        pictures = TrainingImages([torch.randn(1, 4, 8, 8)], None, [(64, 64)], "0" * 16)
        config = TrainingConfig(
            placeholder="<thing>",
            superclass="mug",
            templates=("a photo of a {}",),
            steps=1,
            batch_size=1,
            mode="twin_lock",
        )
        with training_view(model, clip, pictures, "mug", "<thing>") as view:
            concept = train_concept(view, config, covariance).concept
        yield model, clip, covariance, concept


def test_the_covariance_is_that_of_each_encoder_by_itself(learned):
    _, clip, covariance, _ = learned
    assert covariance.parts == CROSS["hunyuan_dit"].widths
    for name, columns in zip(("cond", SECOND), covariance.columns, strict=True):
        rows = []
        for caption in CAPTIONS:
            made = clip.encode_from_tokens(clip.tokenize(caption, min_length=1), return_dict=True)
            # BERT's start token is no word.
            rows.append(made[name][0, int(name == "cond") :].double())
        every = torch.cat(rows)
        expected = every.mT @ every / covariance.tokens
        torch.testing.assert_close(covariance.matrix[columns, columns], expected)


def test_its_own_token_is_known_in_both_encodings_and_no_other_is(learned, worlds):
    model, clip, _, concept = learned
    _, served = apply_concepts(model, clip, [concept], "twin")
    ((cond, more),) = worlds.encode(served, "a photo of a <thing>")
    pairs = zip(untwined(cond), untwined(more[SECOND]), strict=True)
    prompt, twin = (joined(*pair) for pair in pairs)
    found = similarities(prompt, [concept.direction()])[0, :, 0]
    words = torch.cat([more[name][0] for name in ("attention_mask", "attention_mask_mt5xl")])
    own = (found - 1).abs() < 1e-3
    assert own.sum() == 2
    assert own.nonzero()[0] < 77 <= own.nonzero()[1]
    assert words[own].all()
    # The prompt is the one it was trained with, so these are the very encodings of its direction.
    assert not torch.equal(prompt[0, own], twin[0, own])


def test_a_prompt_without_it_carries_nothing_in_either_encoding(learned, worlds):
    model, clip, _, concept = learned
    _, served = apply_concepts(model, clip, [concept], "twin")
    ((cond, more),) = worlds.encode(served, "a photo of a cat")
    ((plain, plain_more),) = worlds.encode(clip, "a photo of a cat")
    assert type(cond) is type(more[SECOND]) is torch.Tensor
    assert torch.equal(cond, plain)
    assert torch.equal(more[SECOND], plain_more[SECOND])
