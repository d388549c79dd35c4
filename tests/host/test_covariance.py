"""Statistics of a real CLIP are those of what its encode node gives out."""

from __future__ import annotations

import pytest
import torch
from comfy import sd
from comfyui_perfusion.host.captions import COUNT, everyday_captions
from comfyui_perfusion.host.covariance import measure_covariance
from comfyui_perfusion.host.text import TextEncoders

CAPTIONS = ["a cat", "two dogs on the beach, at night", "word " * 90]
# Tokens and the end token; the long one takes two sections.
TOKENS = 2 + 1 + 8 + 1 + 90 + 2


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_it_is_the_mean_over_words_and_end_tokens_of_the_encode_nodes_output(worlds, family):
    clip = worlds.clip(family)
    rows = []
    for caption in CAPTIONS:
        tokens = clip.tokenize(caption)
        encoding = clip.encode_from_tokens(tokens)[0].double()
        for at, section in enumerate(tokens["l"]):
            ids = [token for token, _ in section]
            end = ids.index(49407)
            rows.append(encoding[77 * at + 1 : 77 * at + end + 1])
    wanted = torch.cat(rows)
    found = measure_covariance(clip, CAPTIONS)
    assert found.tokens == len(wanted) == TOKENS
    assert found.positions == "words"
    expected = wanted.mT @ wanted / len(wanted)
    torch.testing.assert_close(found.matrix, expected, rtol=1e-4, atol=1e-4)


def test_captions_without_a_word_are_refused(worlds):
    with pytest.raises(ValueError, match="captions to measure the covariance on, found none"):
        measure_covariance(worlds.clip("sd1"), ["", "  "])


def test_progress_is_told_after_each_batch(worlds):
    told = []
    measure_covariance(worlds.clip("sd1"), ["a"] * 40, lambda *done: told.append(done))
    assert told == [(32, 40), (40, 40)]


def test_the_digest_follows_clip_skip_lora_and_weights_but_not_placeholders(worlds):
    clip = worlds.clip("sd1")
    own = TextEncoders(clip).digest()
    assert TextEncoders(clip.clone()).digest() == own
    skipped = clip.clone()
    skipped.clip_layer(-2)
    key = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    lora = {
        f"{key}.lora_up.weight": torch.ones(64, 1),
        f"{key}.lora_down.weight": torch.ones(1, 768),
    }
    changed = sd.load_lora_for_models(None, clip, lora, 1.0, 0.5)[1]
    stronger = sd.load_lora_for_models(None, clip, lora, 1.0, 0.6)[1]
    digests = {own, *(TextEncoders(each).digest() for each in (skipped, changed, stronger))}
    assert len(digests) == 4
    assert TextEncoders(worlds.new_clip("sd1", seed=9)).digest() not in digests


def test_the_built_in_captions_are_many_different_and_always_the_same():
    captions = everyday_captions()
    assert captions == everyday_captions()
    assert len(set(captions)) > 0.99 * COUNT
    words = {word for caption in captions for word in caption.split()}
    assert len(words) > 300
