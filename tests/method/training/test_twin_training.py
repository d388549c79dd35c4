"""Training with the twin lock: what it learns, and that no text encoder takes part in a step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from perfusion.gated.gate import Gate
from perfusion.gated.twin_lock import (
    TwinProjections,
    twin_direction,
    twin_gates,
    twin_inputs,
    twin_projection,
)
from perfusion.text.prompts import fill
from perfusion.training.denoiser import Batch, Conditioning, Projections
from perfusion.training.results import TrainingCallbacks, TrainingResult
from perfusion.training.run import train_concept
from perfusion.training.state import load_state, save_state
from tests.method.tiny_diffusion import (
    TEMPLATES,
    TinyDenoiser,
    assert_identical,
    colour_error,
    config,
    noise_errors,
)


def twin(**changes):
    """The settings of a small training with the twin lock."""
    return config(**{"mode": "twin_lock", **changes})


def watch_text(denoiser, monkeypatch) -> list[tuple[str, Sequence[str]]]:
    """What the text encoder is asked for from now on: (by which method, its prompts)."""
    asked: list[tuple[str, Sequence[str]]] = []
    for name in ("encode", "encode_superclass", "encode_twins"):
        original = getattr(denoiser, name)

        def watched(prompts, *rest, name=name, original=original):
            asked.append((name, tuple(prompts)))
            return original(prompts, *rest)

        monkeypatch.setattr(denoiser, name, watched)
    return asked


def watch_errors(denoiser, monkeypatch) -> list[tuple[Batch, Conditioning, Projections | None]]:
    """What the model is asked for from now on."""
    asked: list[tuple[Batch, Conditioning, Projections | None]] = []
    original = denoiser.errors

    def watched(batch: Batch, encoded: Conditioning, edit: Projections | None) -> Tensor:
        asked.append((batch, encoded, edit))
        return original(batch, encoded, edit)

    monkeypatch.setattr(denoiser, "errors", watched)
    return asked


def twin_error(denoiser: TinyDenoiser, result: TrainingResult) -> float:
    """Mean loss on the thing's images by the concept as it is used with twin lock."""
    random = torch.Generator().manual_seed(77)
    prompts = [fill(TEMPLATES[n % 4], "sks") for n in range(200)]
    images = denoiser.images[torch.arange(200) % denoiser.image_count]
    concept = result.concept
    named, own = denoiser.encode_twins(prompts, concept.embeddings)
    gates = twin_gates(named.encodings, own.encodings, [concept.twin_direction()])
    values = {name: output[None] for name, output in concept.o_v.items()}
    inputs = twin_inputs(own.encodings, gates)
    edit = TwinProjections(own.encodings, inputs, gates, values)
    with torch.no_grad():
        noise = torch.randn(images.shape, generator=random)
        times = torch.linspace(0, 0.99, 200)
        errors = noise_errors(denoiser.unet, images, times, own.encodings, edit, noise)
    return float(errors.mean())


def test_a_concept_trained_with_twin_lock_shows_the_thing_its_superclass_could_not(
    denoiser, covariance
):
    result = train_concept(denoiser, twin(steps=150, batch_size=8), covariance)
    assert result.error is None
    assert result.concept.key_lock == "twin"
    assert twin_error(denoiser, result) < 0.6 * colour_error(denoiser, None)
    assert sum(result.losses[-20:]) < 0.6 * sum(result.losses[:20])


def test_values_alone_are_learned_from_where_the_superclass_has_them(denoiser, covariance):
    start: list[TrainingResult] = []
    callbacks = TrainingCallbacks(on_checkpoint=start.append)
    settings = twin(checkpoint_every=1, learning_rate=0.1, rate_unit="absolute")
    found = train_concept(denoiser, settings, covariance, callbacks)
    first, last = start[0].concept, found.concept
    for name, vector in denoiser.random_embeddings().items():
        assert torch.equal(last.embeddings[name], vector)
    for field in ("i", "u", "superclass_encoding"):
        assert torch.equal(getattr(first, field), getattr(last, field))
    assert last.o_k is None
    learned = {name for name in found.state.tensors if name.startswith("adam.exp_avg.")}
    assert learned == {f"adam.exp_avg.v.{layer}" for layer in denoiser.layers}
    for layer, output in last.o_v.items():
        own = denoiser.project(layer, "v", last.superclass_encoding)
        # Adam's first step is its rate, whatever the gradient.
        step = (first.o_v[layer] - own).abs()
        torch.testing.assert_close(step, torch.full_like(step, 0.1), rtol=1e-2, atol=1e-4)
        assert not torch.equal(output, first.o_v[layer])


def test_the_input_is_the_mean_encoding_of_the_placeholder_over_all_prompts(denoiser, covariance):
    concept = train_concept(denoiser, twin(steps=1), covariance).concept
    prompts = [fill(template, "sks") for template in TEMPLATES]
    named, own = denoiser.encode_twins(prompts, denoiser.random_embeddings())
    expected = named.encodings[named.mask].double().mean(0)
    torch.testing.assert_close(concept.i.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(concept.superclass_encoding, own.encodings[own.mask].mean(0))
    torch.testing.assert_close(concept.u.double(), covariance.dual(expected), rtol=1e-4, atol=1e-4)


def test_every_prompt_is_encoded_once_before_the_first_step(denoiser, covariance, monkeypatch):
    asked = watch_text(denoiser, monkeypatch)
    at_first: list[int] = []
    released: list[int] = []
    original = denoiser.errors

    def watched(*args):
        at_first.append(len(asked))
        released.append(denoiser.released)
        return original(*args)

    monkeypatch.setattr(denoiser, "errors", watched)
    train_concept(denoiser, twin(steps=12, templates=(*TEMPLATES, TEMPLATES[0])), covariance)
    assert {name for name, _ in asked} == {"encode_twins"}
    prompts = [prompt for _, some in asked for prompt in some]
    assert sorted(prompts) == sorted(fill(template, "sks") for template in TEMPLATES)
    assert set(at_first) == {len(asked)}
    assert set(released) == {1}


def test_captions_take_the_templates_place(denoiser, covariance, monkeypatch):
    asked = watch_text(denoiser, monkeypatch)
    captions = ("a {}", "a photo of a {}", "a {}", "my {}", "one {}")
    train_concept(denoiser, twin(captions=captions), covariance)
    prompts = [prompt for _, some in asked for prompt in some]
    assert prompts == ["a sks", "a photo of a sks", "my sks", "one sks"]


def test_a_step_conditions_on_the_twin_and_edits_as_the_pure_function_does(
    denoiser, covariance, monkeypatch
):
    asked = watch_errors(denoiser, monkeypatch)
    result = train_concept(denoiser, twin(steps=1, batch_size=12), covariance)
    _, encoded, edit = asked[0]
    assert isinstance(edit, TwinProjections)
    prompts = [fill(template, "sks") for template in TEMPLATES]
    named, own = denoiser.encode_twins(prompts, denoiser.random_embeddings())
    of_prompt = [
        next(at for at in range(4) if torch.allclose(own.encodings[at], row, atol=1e-6))
        for row in encoded.encodings
    ]
    assert set(of_prompt) == {0, 1, 2, 3}
    direction = result.concept.with_gate(0.75, 0.1).twin_direction()
    for layer in denoiser.layers:
        attention = denoiser.unet.attention[layer]
        expected = twin_projection(
            attention.to_v.weight,
            named.encodings[of_prompt],
            own.encodings[of_prompt],
            [direction],
            edit.values[layer].detach(),
        )
        torch.testing.assert_close(
            edit.apply(attention.to_v, layer, "v").detach(), expected, rtol=1e-4, atol=1e-5
        )
        keys = edit.apply(attention.to_k, layer, "k")
        assert torch.equal(keys, attention.to_k(encoded.encodings))


def test_a_twin_training_gives_the_same_bits_twice_and_in_parts(denoiser, covariance):
    first = train_concept(denoiser, twin(), covariance)
    assert_identical(train_concept(denoiser, twin(), covariance), first)
    parts = train_concept(denoiser, twin(rows_at_once=1), covariance)
    for name, output in first.concept.o_v.items():
        torch.testing.assert_close(parts.concept.o_v[name], output, rtol=1e-3, atol=1e-4)
    other = train_concept(denoiser, twin(seed=10), covariance)
    assert other.losses != first.losses


def test_a_twin_training_goes_on_bit_for_bit_from_its_file(denoiser, covariance, tmp_path):
    whole = train_concept(denoiser, twin(steps=8), covariance)
    begun = train_concept(denoiser, twin(steps=3), covariance)
    save_state(begun.state, tmp_path / "training.state")
    state = load_state(tmp_path / "training.state")
    longer = train_concept(denoiser, twin(steps=8), covariance, resume=state)
    assert_identical(longer, whole)
    with pytest.raises(ValueError, match="another run's"):
        train_concept(denoiser, config(steps=8), covariance, resume=state)


def test_gates_follow_the_input_of_the_state(denoiser, covariance, monkeypatch):
    begun = train_concept(denoiser, twin(steps=3), covariance)
    moved = begun.state.tensors["i"] + 0.3
    state = replace(begun.state, tensors={**begun.state.tensors, "i": moved})
    asked = watch_errors(denoiser, monkeypatch)
    longer = train_concept(denoiser, twin(steps=4), covariance, resume=state)
    torch.testing.assert_close(longer.concept.i.double(), moved, rtol=1e-6, atol=1e-6)
    edit = asked[0][2]
    assert isinstance(edit, TwinProjections)
    superclass = begun.concept.superclass_encoding.to(moved)
    direction = twin_direction(moved, superclass, Gate(0.75, 0.1))
    prompts = [fill(template, "sks") for template in TEMPLATES]
    named, own = denoiser.encode_twins(prompts, denoiser.random_embeddings())
    gates = twin_gates(named.encodings, own.encodings, [direction])
    found = edit.gates[0]
    assert any(torch.allclose(found, of_prompt, atol=1e-6) for of_prompt in gates)


def test_a_superclass_of_two_words_speaks_at_its_last_one(denoiser, covariance, monkeypatch):
    denoiser.superclass = "bird bath"
    asked = watch_errors(denoiser, monkeypatch)
    train_concept(denoiser, twin(superclass="bird bath"), covariance)
    (_, encoded, edit) = asked[0]
    assert isinstance(edit, TwinProjections)
    prompts = [fill(template, "bird bath") for template in TEMPLATES]
    own = denoiser.encode_superclass(prompts)
    for row in range(len(encoded.encodings)):
        at = next(n for n in range(4) if torch.allclose(own.encodings[n], encoded.encodings[row]))
        first, last = own.mask[at].nonzero().flatten().tolist()
        assert float(edit.gates[row, : first + 1].abs().max()) == 0
        assert float(edit.gates[row, last]) > 0.5


def test_fp16_gradients_are_scaled_without_the_text_being_encoded_again(
    denoiser, covariance, monkeypatch
):
    expected = train_concept(denoiser, twin(), covariance)
    denoiser.needs_scaling = True
    asked = watch_text(denoiser, monkeypatch)
    found = train_concept(denoiser, twin(), covariance)
    assert found.error is None
    assert len(asked) == 1
    for name, output in expected.concept.o_v.items():
        torch.testing.assert_close(found.concept.o_v[name], output, rtol=1e-3, atol=1e-4)


def test_a_text_encoding_of_nan_is_refused_before_the_first_step(denoiser, covariance, monkeypatch):
    original = denoiser.encode_twins

    def spoiled(prompts: Sequence[str], embeddings: Mapping[str, Tensor]):
        named, own = original(prompts, embeddings)
        return replace(named, encodings=named.encodings * torch.nan), own

    monkeypatch.setattr(denoiser, "encode_twins", spoiled)
    with pytest.raises(ValueError, match="finite encoding of 'sks'"):
        train_concept(denoiser, twin(), covariance)


def test_a_twin_concept_records_how_it_was_made(denoiser, covariance):
    settings = json.loads(train_concept(denoiser, twin(), covariance).concept.metadata["training"])
    assert (settings["mode"], settings["rate_unit"]) == ("twin_lock", "relative")
