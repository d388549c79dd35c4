"""Runs that end early, go on later, or never begin: nothing that was learned is lost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from perfusion.concept.concept import Concept
from perfusion.gated.covariance import Covariance
from perfusion.gated.rank_one import GatedProjections, Part
from perfusion.training.denoiser import Batch, Conditioning
from perfusion.training.results import Progress, TrainingCallbacks, TrainingResult
from perfusion.training.run import train_concept
from perfusion.training.state import load_state, save_state
from tests.method.tiny_diffusion import (
    SIDE,
    TinyDenoiser,
    TinyUNet,
    assert_identical,
    config,
    everything,
)


class Interrupted(BaseException):
    """Like the host's own: no Exception."""


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_an_interrupt_after_any_step_hands_out_what_was_learned_so_far(stop, denoiser, covariance):
    partial: list[TrainingResult] = []

    def interrupt(progress: Progress) -> None:
        assert math.isfinite(progress.loss)
        if progress.step == stop:
            raise Interrupted

    callbacks = TrainingCallbacks(on_step=interrupt, on_partial=partial.append)
    with pytest.raises(Interrupted):
        train_concept(denoiser, config(), covariance, callbacks)
    assert partial[0].steps == stop
    assert_identical(partial[0], train_concept(denoiser, config(steps=stop), covariance))


@pytest.mark.parametrize("where", ["encode", "errors"])
def test_an_interrupt_inside_the_model_hands_out_the_last_whole_step(where, denoiser, covariance):
    # A vector that starts at the superclass is not encoded before the first step.
    settings = config(vector_start="superclass")
    expected = train_concept(denoiser, replace(settings, steps=2), covariance)
    original, calls, partial = getattr(denoiser, where), [], []

    def interrupting(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise Interrupted
        return original(*arguments)

    setattr(denoiser, where, interrupting)
    callbacks = TrainingCallbacks(on_partial=partial.append)
    with pytest.raises(Interrupted):
        train_concept(denoiser, settings, covariance, callbacks)
    assert len(partial) == 1
    assert_identical(partial[0], expected)


def test_an_ordinary_error_hands_out_the_last_whole_step_too(denoiser, covariance):
    partial: list[TrainingResult] = []

    def fail(progress: Progress) -> None:
        raise RuntimeError("no room on the disk")

    callbacks = TrainingCallbacks(on_step=fail, on_partial=partial.append)
    with pytest.raises(RuntimeError, match="no room"):
        train_concept(denoiser, config(), covariance, callbacks)
    assert partial[0].steps == 1


def test_nan_in_the_loss_ends_training_with_the_last_good_state(denoiser, covariance):
    expected = train_concept(denoiser, config(steps=2), covariance)
    original, calls = denoiser.errors, []

    def spoiled(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return original(*arguments) * (math.nan if len(calls) == 3 else 1.0)

    denoiser.errors = spoiled  # type: ignore[method-assign]
    result = train_concept(denoiser, config(), covariance)
    assert result.error == "step 3: its loss is nan"
    assert_identical(result, expected)


def test_a_picture_of_nan_ends_training_before_it_learned_anything_wrong(denoiser, covariance):
    denoiser.images[2] = math.nan
    result = train_concept(denoiser, config(batch_size=5), covariance)
    assert result.error is not None
    assert result.steps == 0
    assert all(tensor.isfinite().all() for tensor in everything(result))


def test_nan_in_the_text_encoding_ends_training_with_the_last_good_state(denoiser, covariance):
    original, calls = denoiser.encode, []

    def spoiled(*arguments: Any) -> Conditioning:
        calls.append(arguments)
        encoded = original(*arguments)
        factor = math.nan if len(calls) == 2 else 1.0
        return replace(encoded, encodings=encoded.encodings * factor)

    denoiser.encode = spoiled  # type: ignore[method-assign]
    result = train_concept(denoiser, config(vector_start="superclass"), covariance)
    assert result.error == "step 2: its text encoding holds NaN or infinity"
    assert result.steps == 1


def test_a_step_with_a_gradient_of_nan_is_not_kept(denoiser, covariance):
    expected = train_concept(denoiser, config(steps=1), covariance)
    original, calls = denoiser.errors, []

    def spoiled(batch: Batch, encoded: Conditioning, edit: GatedProjections | None) -> Tensor:
        calls.append(batch)
        errors = original(batch, encoded, edit)
        # The root of zero is finite, its slope is not.
        return errors + (0 * errors).abs().sqrt() if len(calls) == 2 else errors

    denoiser.errors = spoiled  # type: ignore[method-assign]
    result = train_concept(denoiser, config(), covariance)
    assert result.error == "step 2: it made NaN or infinity; try a smaller learning rate"
    assert_identical(result, expected)


@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_goes_on_from_a_file_bit_for_bit(stop, denoiser, covariance, tmp_path):
    denoiser.variant_count = 2
    whole = train_concept(denoiser, config(), covariance)
    part = train_concept(denoiser, config(steps=stop), covariance)
    save_state(part.state, tmp_path / "state.safetensors")
    state = load_state(tmp_path / "state.safetensors")
    later = train_concept(denoiser, config(), covariance, resume=state)
    assert later.steps == 6
    assert_identical(later, whole)
    assert later.record.csv() == whole.record.csv()
    assert later.state.tensors.keys() == whole.state.tensors.keys()
    for name, tensor in whole.state.tensors.items():
        assert torch.equal(later.state.tensors[name], tensor), name


def test_a_finished_run_is_its_result_at_once(denoiser, covariance):
    whole = train_concept(denoiser, config(), covariance)
    assert_identical(train_concept(denoiser, config(), covariance, resume=whole.state), whole)


def test_a_run_does_not_go_on_from_another_ones_state(denoiser, covariance):
    state = train_concept(denoiser, config(steps=2), covariance).state
    for change in ({"seed": 8}, {"learning_rate": 0.01}, {"batch_size": 5}, {"background": 0.5}):
        with pytest.raises(ValueError, match="found another run's"):
            train_concept(denoiser, config(**change), covariance, resume=state)
    denoiser.data_hash = "other pictures"
    with pytest.raises(ValueError, match="found another run's"):
        train_concept(denoiser, config(), covariance, resume=state)


def test_a_state_without_one_of_its_parts_is_refused(denoiser, covariance):
    state = train_concept(denoiser, config(steps=2), covariance).state
    for name in state.tensors:
        if name.startswith("adam.step"):
            continue
        parts = {key: tensor for key, tensor in state.tensors.items() if key != name}
        with pytest.raises(ValueError, match=f"{name}: expected .*found nothing"):
            train_concept(denoiser, config(), covariance, resume=replace(state, tensors=parts))


def test_should_stop_ends_a_run_with_what_it_has(denoiser, covariance):
    seen: list[int] = []
    callbacks = TrainingCallbacks(
        on_step=lambda progress: seen.append(progress.step), should_stop=lambda: len(seen) == 3
    )
    result = train_concept(denoiser, config(), covariance, callbacks)
    assert result.steps == 3
    assert result.error is None
    assert_identical(result, train_concept(denoiser, config(steps=3), covariance))


def test_checkpoints_and_samples_come_when_they_are_due_and_change_nothing(denoiser, covariance):
    checkpoints, samples = [], []

    def sample(step: int, concept: Concept) -> None:
        samples.append(step)
        torch.rand(7)

    callbacks = TrainingCallbacks(on_checkpoint=checkpoints.append, on_sample=sample)
    settings = config(steps=7, checkpoint_every=3, sample_every=2)
    result = train_concept(denoiser, settings, covariance, callbacks)
    assert [checkpoint.steps for checkpoint in checkpoints] == [3, 6, 7]
    assert samples == [0, 2, 4, 6, 7]
    assert_identical(result, train_concept(denoiser, config(steps=7), covariance))
    assert_identical(checkpoints[0], train_concept(denoiser, config(steps=3), covariance))


class OutOfMemory(RuntimeError):
    """Like torch's."""


def short_of_memory(denoiser: TinyDenoiser, most: int) -> None:
    """Fail whenever more than ``most`` rows are computed at once."""
    original = denoiser.errors

    def errors(batch: Batch, encoded: Conditioning, edit: GatedProjections | None) -> Tensor:
        if len(batch.indices) > most:
            raise OutOfMemory
        return original(batch, encoded, edit)

    denoiser.errors = errors  # type: ignore[method-assign]


def test_fewer_rows_at_once_when_memory_is_short_give_the_same_steps(denoiser, covariance):
    expected = train_concept(denoiser, config(batch_size=8), covariance)
    short_of_memory(denoiser, 2)
    tried: list[int] = []
    callbacks = TrainingCallbacks(
        is_out_of_memory=lambda error: isinstance(error, OutOfMemory), on_fewer_rows=tried.append
    )
    found = train_concept(denoiser, config(batch_size=8), covariance, callbacks)
    assert tried == [4, 2]
    for ours, theirs in zip(everything(found), everything(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_memory_that_does_not_suffice_for_one_row_is_an_error_with_nothing_lost(
    denoiser, covariance
):
    short_of_memory(denoiser, 0)
    partial: list[TrainingResult] = []
    callbacks = TrainingCallbacks(
        is_out_of_memory=lambda error: isinstance(error, OutOfMemory), on_partial=partial.append
    )
    with pytest.raises(OutOfMemory):
        train_concept(denoiser, config(), covariance, callbacks)
    assert partial[0].steps == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a finite number above 0"),
        ({"embedding_learning_rate": math.inf}, "embedding_learning_rate: expected a finite"),
        ({"temperature": math.nan}, "temperature: expected a finite"),
        ({"bias": math.nan}, "bias: expected a finite"),
        ({"ema": 1.5}, "ema: expected 0 to 1"),
        ({"background": -0.1}, "background: expected 0 to 1"),
        ({"seed": -1}, "seed: expected 0"),
        ({"mode": "lora"}, "mode: expected one of twin_lock, perfusion"),
        ({"schedule": "linear"}, "schedule: expected one of constant, cosine"),
        ({"placeholder": "my cat"}, "placeholder: expected one word"),
        ({"placeholder": "cat"}, "placeholder: expected another word than the superclass"),
        ({"superclass": " "}, "superclass: expected 1 to 128"),
        ({"templates": ()}, "at least one prompt template"),
        ({"templates": ("a cat",)}, "exactly one {} in template 1, .*found 'a cat'"),
        ({"templates": ("{} and {}",)}, "exactly one {}"),
        ({"templates": ("a {0} {}",)}, "exactly one {}"),
        ({"captions": ("a {}", "a cat")}, "one {} in caption 2"),
        ({"normalisation": "area"}, "normalisation: expected one of subject, picture"),
        ({"rows_at_once": -1}, "rows_at_once: expected 0 or more"),
        ({"checkpoint_every": -1}, "checkpoint_every: expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused_when_made(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_what_cannot_be_trained_is_refused_before_the_first_step(denoiser, covariance):
    def refused(message: str, metric: Covariance = covariance) -> None:
        with pytest.raises(ValueError, match=message):
            train_concept(denoiser, config(), metric)

    other = replace(covariance, encoder_hash="another-text")
    refused("text encoder .tiny-text., found one of another-text", other)
    narrow = replace(covariance, matrix=covariance.matrix[1:, 1:].clone())
    refused(r"shape \(15,\), the covariance's, found \(16,\)", narrow)
    denoiser.superclass = "dog"
    refused("expected 'cat' in every prompt, found 'a cat' without it")
    denoiser.superclass = "cat"
    denoiser.mask_maps = torch.ones(5, 1, SIDE, SIDE)
    denoiser.mask_maps[3] = 0
    refused("some above it for image 3, found 0.0 to 0.0")
    denoiser.mask_maps = None
    denoiser.layers = {}
    refused("cross-attention layers over text in the tiny model, found none")
    denoiser.images = denoiser.images[:0]
    refused("at least one training image")


def test_a_layer_the_model_does_not_use_is_an_error_and_not_silently_skipped(denoiser, covariance):
    denoiser.unet = TinyUNet().requires_grad_(False)
    del denoiser.unet.mixing["high"]
    lone = denoiser.unet.attention["high"]
    del denoiser.unet.attention["high"]
    original = denoiser.project

    def project(layer: str, part: Part, encodings: Tensor) -> Tensor:
        if layer == "high":
            return getattr(lone, f"to_{part}")(encodings)
        return original(layer, part, encodings)

    denoiser.project = project  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"value output of high: .*no gradient"):
        train_concept(denoiser, config(), covariance)
