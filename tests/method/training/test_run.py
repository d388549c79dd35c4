"""What training learns, and that it learns nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from perfusion.gated.gate import Gate
from perfusion.gated.rank_one import GatedProjections, edit_projection, gated_inputs, similarities
from perfusion.text.prompts import fill
from perfusion.training.denoiser import Batch, Conditioning
from perfusion.training.results import TrainingResult
from perfusion.training.run import train_concept
from tests.method.tiny_diffusion import (
    TEMPLATES,
    WORDS,
    assert_identical,
    colour_error,
    config,
    edit_of,
    everything,
    token_ids,
)


def test_a_trained_concept_shows_the_thing_its_superclass_could_not(denoiser, covariance):
    result = train_concept(denoiser, config(steps=150, batch_size=8), covariance)
    word, concept = colour_error(denoiser, None), colour_error(denoiser, result)
    assert result.error is None
    assert concept < 0.4 * word
    assert sum(result.losses[-20:]) < 0.5 * sum(result.losses[:20])


def test_the_gate_opens_for_the_concept_and_stays_closed_for_other_words(denoiser, covariance):
    concept = train_concept(denoiser, config(steps=60), covariance).concept
    encoded = denoiser.encode(["a photo of my sks", "a photo of the dog"], concept.embeddings)
    similarity = similarities(encoded.encodings, [concept.direction()])[..., 0]
    assert float(similarity[0, 4]) > 0.8
    assert float(similarity[1, 4]) < 0.5


def test_the_model_is_left_exactly_as_it_was(denoiser, covariance):
    modules = {"text": denoiser.text, "unet": denoiser.unet}
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in modules.items()}
    train_concept(denoiser, config(), covariance)
    for name, module in modules.items():
        assert all(torch.equal(before[name][k], v) for k, v in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())


def test_training_starts_at_the_superclass_with_its_keys_locked(denoiser, covariance):
    seen: list[GatedProjections] = []
    original = denoiser.errors

    def watched(batch: Batch, encoded: Conditioning, edit: GatedProjections | None) -> Tensor:
        assert edit is not None
        keys = {name: output.detach().clone() for name, output in edit.keys.items()}
        values = {name: output.detach().clone() for name, output in edit.values.items()}
        seen.append(replace(edit, keys=keys, values=values))
        return original(batch, encoded, edit)

    denoiser.errors = watched  # type: ignore[method-assign]
    concept = train_concept(denoiser, config(steps=3), covariance).concept
    encoded = denoiser.encode_superclass([fill(template, "cat") for template in TEMPLATES])
    expected = encoded.encodings[encoded.mask].mean(0)
    torch.testing.assert_close(concept.superclass_encoding, expected)
    for name in denoiser.layers:
        key = denoiser.project(name, "k", expected)[None]
        torch.testing.assert_close(
            seen[0].values[name], denoiser.project(name, "v", expected)[None]
        )
        for edit in seen:
            torch.testing.assert_close(edit.keys[name], key)
        assert not torch.equal(seen[1].values[name], seen[0].values[name])


def test_the_edit_training_uses_is_equation_three_with_the_followed_input(denoiser, covariance):
    seen: list[tuple[Tensor, GatedProjections]] = []
    original = denoiser.errors

    def watched(batch: Batch, encoded: Conditioning, edit: GatedProjections | None) -> Tensor:
        assert edit is not None
        seen.append((encoded.encodings, edit))
        return original(batch, encoded, edit)

    denoiser.errors = watched  # type: ignore[method-assign]
    result = train_concept(denoiser, config(steps=1, ema=0.3), covariance)
    encodings, edit = seen[0]
    direction = result.concept.with_gate(bias=0.75, temperature=0.1).direction()
    layer = denoiser.unet.attention["low"]
    expected = edit_projection(layer.to_k.weight, encodings, [direction], edit.keys["low"])
    torch.testing.assert_close(edit.apply(layer.to_k, "low", "k"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["random", "superclass"])
@pytest.mark.parametrize("ema", [1.0, 0.0, 0.9])
def test_the_input_follows_the_concepts_encoding_once_per_step(ema, start, denoiser, covariance):
    means: list[Tensor] = []
    original = denoiser.errors

    def watched(batch: Batch, encoded: Conditioning, edit: GatedProjections | None) -> Tensor:
        means.append(encoded.encodings[encoded.mask].detach().mean(0))
        return original(batch, encoded, edit)

    denoiser.errors = watched  # type: ignore[method-assign]
    settings = config(steps=4, ema=ema, vector_start=start)
    concept = train_concept(denoiser, settings, covariance).concept
    expected = concept.superclass_encoding
    if start == "random":
        prompts = [fill(template, "sks") for template in TEMPLATES]
        first = denoiser.encode(prompts, denoiser.random_embeddings())
        expected = first.encodings[first.mask].mean(0)
    for mean in means:
        expected = ema * expected + (1 - ema) * mean
    assert len(means) == 4
    torch.testing.assert_close(concept.i, expected)
    torch.testing.assert_close(concept.u.double(), covariance.dual(concept.i), rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_identical_results_whatever_the_global_generator(denoiser, covariance):
    torch.manual_seed(1)
    one = train_concept(denoiser, config(), covariance)
    torch.manual_seed(2)
    assert_identical(one, train_concept(denoiser, config(), covariance))
    other = train_concept(denoiser, config(seed=10), covariance)
    assert one.losses != other.losses


def test_training_does_not_touch_the_global_generator(denoiser, covariance):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    train_concept(denoiser, config(), covariance)
    assert torch.equal(torch.rand(3), expected)


def test_textual_inversion_trains_the_embedding_alone(denoiser, covariance):
    edits: list[GatedProjections | None] = []
    original = denoiser.errors

    def watched(batch: Batch, encoded: Conditioning, edit: GatedProjections | None) -> Tensor:
        edits.append(edit)
        return original(batch, encoded, edit)

    denoiser.errors = watched  # type: ignore[method-assign]
    settings = config(mode="textual_inversion", steps=60, embedding_learning_rate=0.05)
    result = train_concept(denoiser, settings, covariance)
    concept = result.concept
    assert edits == [None] * 60
    assert concept.gate.strength == 0
    for name, output in concept.o_v.items():
        expected = denoiser.project(name, "v", concept.superclass_encoding)
        torch.testing.assert_close(output, expected)
    assert not torch.equal(concept.embeddings["l"], denoiser.initial_embeddings()["l"])
    assert colour_error(denoiser, result) < colour_error(denoiser, None)


def test_trained_keys_move_away_from_the_superclass_and_are_kept(denoiser, covariance):
    concept = train_concept(denoiser, config(mode="trained_keys"), covariance).concept
    assert concept.key_lock == "trained"
    assert concept.o_k is not None
    for name, output in concept.o_k.items():
        locked = denoiser.project(name, "k", concept.superclass_encoding)
        assert float((output - locked).abs().max()) > 1e-3


def test_a_superclass_of_two_words_locks_to_its_last_one_and_starts_at_their_mean(
    denoiser, covariance
):
    denoiser.superclass = "bird bath"
    concept = train_concept(
        denoiser,
        config(
            superclass="bird bath",
            steps=1,
            embedding_learning_rate=1e-9,
            vector_start="superclass",
        ),
        covariance,
    ).concept
    vectors = denoiser.text.tokens.weight
    mean = (vectors[WORDS.index("bird")] + vectors[WORDS.index("bath")]) / 2
    torch.testing.assert_close(concept.embeddings["l"], mean)
    ids = token_ids([fill(template, "bird bath") for template in TEMPLATES])
    last = denoiser.text(denoiser.text.tokens(ids))[ids == WORDS.index("bath")]
    torch.testing.assert_close(concept.superclass_encoding, last.mean(0))


def test_a_vector_that_starts_at_random_leaves_the_gate_of_the_everyday_word_shut(
    denoiser, covariance
):
    opened = {}
    for start in ("random", "superclass"):
        settings = config(steps=60, vector_start=start)
        concept = train_concept(denoiser, settings, covariance).concept
        encoded = denoiser.encode_superclass(["a photo of my cat"])
        encoding = encoded.encodings[encoded.mask]
        opened[start] = float(gated_inputs(encoding, [concept.direction()])[1])
    assert opened["random"] < 0.1
    assert opened["superclass"] > 0.3


def test_textual_inversion_starts_at_the_superclass_wherever_others_start(denoiser, covariance):
    settings = config(mode="textual_inversion", steps=1, embedding_learning_rate=1e-9)
    concept = train_concept(denoiser, settings, covariance).concept
    torch.testing.assert_close(concept.embeddings, denoiser.initial_embeddings())


def test_a_run_that_starts_at_the_superclass_is_named_as_it_was_before_there_was_a_choice():
    published = config(vector_start="superclass")
    assert "vector_start" not in published.fingerprint() | published.settings()
    apart = config()
    assert apart.fingerprint()["vector_start"] == apart.settings()["vector_start"] == "random"
    twin = config(mode="twin_lock")
    assert "vector_start" not in twin.fingerprint() | twin.settings()
    with pytest.raises(ValueError, match="vector_start: expected one of random, superclass"):
        config(vector_start="here")


def test_the_cosine_schedule_slows_the_last_steps_down(denoiser, covariance):
    constant = train_concept(denoiser, config(), covariance)
    cosine = train_concept(denoiser, config(schedule="cosine"), covariance)
    assert cosine.losses[:2] == constant.losses[:2]

    def moved(result: TrainingResult) -> float:
        concept = result.concept
        start = denoiser.project("low", "v", concept.superclass_encoding)
        return float((concept.o_v["low"] - start).norm())

    assert moved(cosine) < 0.8 * moved(constant)


def test_fp16_gradients_are_scaled_until_they_fit(denoiser, covariance):
    expected = train_concept(denoiser, config(), covariance)
    denoiser.needs_scaling = True
    original = denoiser.errors

    def narrow(batch: Batch, encoded: Conditioning, edit: GatedProjections | None) -> Tensor:
        errors = original(batch, encoded, edit)
        # As fp16 would: a gradient above 65,504 becomes infinity.
        errors.register_hook(lambda g: g.masked_fill(g.abs() > 20, float("inf")))
        return errors

    denoiser.errors = narrow  # type: ignore[method-assign]
    found = train_concept(denoiser, config(), covariance)
    assert found.error is None
    assert found.state.scale < 2**16
    torch.testing.assert_close(found.concept.i, expected.concept.i)
    for ours, theirs in zip(everything(found), everything(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_concept_records_how_it_was_made(denoiser, covariance):
    concept = train_concept(denoiser, config(), covariance).concept
    settings = json.loads(concept.metadata["training"])
    assert settings["seed"] == 9
    assert settings["steps"] == 6
    assert settings["images"] == 5
    assert settings["templates"] == list(TEMPLATES)
    assert concept.metadata["covariance_hash"] == covariance.digest
    assert concept.metadata["encoder_hash"] == "tiny-text"
    assert (concept.family, concept.train_gate) == ("tiny", Gate(0.75, 0.1))


def test_the_gradient_of_the_outputs_agrees_with_finite_differences(denoiser, covariance):
    result = train_concept(denoiser, config(steps=20), covariance)
    concept = result.concept
    text, unet = denoiser.text.double(), denoiser.unet.double()
    images = denoiser.images.double()
    try:
        vector = concept.embeddings["l"].double().requires_grad_()
        values = [output.double().requires_grad_() for output in concept.o_v.values()]

        def loss(embedding: Tensor, low: Tensor, high: Tensor) -> Tensor:
            encoded = denoiser.encode(["a photo of my sks"], {"l": embedding})
            edit = edit_of(denoiser, result, encoded.encodings)
            edit = replace(
                edit,
                keys={name: output.double() for name, output in edit.keys.items()},
                values={"low": low[None], "high": high[None]},
            )
            random = torch.Generator().manual_seed(6)
            noise = torch.randn(images[:1].shape, generator=random, dtype=torch.float64)
            time = torch.full((1,), 0.4, dtype=torch.float64)
            return ((unet(images[:1] + noise, time, encoded.encodings, edit) - noise) ** 2).mean()

        lock = replace(concept, superclass_encoding=concept.superclass_encoding.double())
        result = replace(result, concept=lock)
        assert torch.autograd.gradcheck(loss, (vector, *values))
    finally:
        text.float()
        unet.float()
