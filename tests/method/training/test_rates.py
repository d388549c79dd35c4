"""Learning rates in the size of what is learned."""

from __future__ import annotations

import json

import pytest
import torch

from perfusion.gated.covariance import CovarianceAccumulator
from perfusion.text.prompts import fill
from perfusion.training.rates import output_rms
from perfusion.training.run import train_concept, training_fingerprint
from tests.method.tiny_diffusion import TEMPLATES, WIDTH, config, token_ids

SCALE = 10.0


def encodings_of(denoiser):
    """Every token of many captions."""
    prompts = [fill(template, word) for word in ("cat", "dog", "bird") for template in TEMPLATES]
    with torch.no_grad():
        return denoiser.text(denoiser.text.tokens(token_ids(prompts)))


@pytest.mark.parametrize("part", ["k", "v"])
def test_the_size_of_a_layers_outputs_is_that_over_the_captions(denoiser, part):
    encodings = encodings_of(denoiser)
    accumulator = CovarianceAccumulator(WIDTH, "all", "tiny-text")
    accumulator.add(encodings)
    ridge = 1e-6
    covariance = accumulator.result(ridge)
    for layer in denoiser.layers:
        outputs = denoiser.project(layer, part, encodings).double()
        expected = float(outputs.square().mean().sqrt())
        assert output_rms(denoiser, layer, part, covariance) == pytest.approx(expected, rel=1e-4)


def test_the_size_is_found_by_the_layers_own_forward(denoiser, covariance, monkeypatch):
    before = output_rms(denoiser, "low", "v", covariance)
    project = denoiser.project
    monkeypatch.setattr(denoiser, "project", lambda *args: 3 * project(*args))
    assert output_rms(denoiser, "low", "v", covariance) == pytest.approx(3 * before)
    monkeypatch.setattr(denoiser, "project", lambda *args: torch.inf * project(*args))
    with pytest.raises(ValueError, match="'low': expected finite values"):
        output_rms(denoiser, "low", "v", covariance)


def moves(denoiser, covariance, **changes):
    """How far each layer's values were moved in a training."""
    concept = train_concept(denoiser, config(**changes), covariance).concept
    starts = {n: denoiser.project(n, "v", concept.superclass_encoding) for n in concept.o_v}
    return {name: output - starts[name] for name, output in concept.o_v.items()}


@pytest.mark.parametrize("mode", ["perfusion", "twin_lock"])
def test_a_relative_rate_learns_the_same_from_values_of_another_size(denoiser, covariance, mode):
    rates = {"relative": 0.25, "absolute": 0.2}
    found = {
        unit: moves(denoiser, covariance, mode=mode, rate_unit=unit, learning_rate=rate)
        for unit, rate in rates.items()
    }
    attention = denoiser.unet.attention["low"]
    before = attention.to_v.weight
    attention.to_v.weight = torch.nn.Parameter(before * SCALE, requires_grad=False)
    attention.value_unit = SCALE
    try:
        larger = {
            unit: moves(denoiser, covariance, mode=mode, rate_unit=unit, learning_rate=rate)
            for unit, rate in rates.items()
        }
    finally:
        attention.to_v.weight = before
        attention.value_unit = 1.0
    # What Adam adds to its divisor counts more where gradients are smaller.
    near = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(larger["relative"]["low"] / SCALE, found["relative"]["low"], **near)
    torch.testing.assert_close(larger["relative"]["high"], found["relative"]["high"], **near)
    ratio = larger["absolute"]["low"].norm() / (SCALE * found["absolute"]["low"].norm())
    assert float(ratio) < 0.5


def test_a_relative_rate_moves_each_layer_by_its_own_size(denoiser, covariance):
    found = moves(denoiser, covariance, steps=1, rate_unit="relative", learning_rate=0.1)
    plain = moves(denoiser, covariance, steps=1, rate_unit="absolute", learning_rate=0.1)
    for layer in denoiser.layers:
        rms = output_rms(denoiser, layer, "v", covariance)
        torch.testing.assert_close(found[layer], rms * plain[layer], rtol=1e-3, atol=1e-5)


def test_the_embeddings_rate_counts_in_the_size_of_the_token_table(denoiser, covariance):
    def moved(unit):
        settings = config(
            mode="textual_inversion", steps=1, rate_unit=unit, embedding_learning_rate=0.01
        )
        vector = train_concept(denoiser, settings, covariance).concept.embeddings["l"]
        return vector - denoiser.initial_embeddings()["l"]

    size = denoiser.token_rms("l")
    torch.testing.assert_close(moved("relative"), size * moved("absolute"), rtol=1e-3, atol=1e-6)


def test_a_run_with_absolute_rates_is_named_as_it_was_before_there_was_a_choice(
    denoiser, covariance
):
    settings = config(rate_unit="absolute")
    assert "rate_unit" not in settings.fingerprint()
    assert "rate_unit" not in settings.settings()
    names = {
        training_fingerprint(denoiser, config(rate_unit=unit), covariance)
        for unit in ("absolute", "relative")
    }
    assert len(names) == 2
    concept = train_concept(denoiser, config(), covariance).concept
    assert json.loads(concept.metadata["training"])["rate_unit"] == "relative"
