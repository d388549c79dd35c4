"""Training a concept inside a ComfyUI prompt: progress, interrupts, nothing lost."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.utils
from torch import Tensor

from ..perfusion.covariance import Covariance
from ..perfusion.training import TrainingResult, train_concept
from ..perfusion.training_config import TrainingConfig
from .concept_files import write_interrupted
from .covariance import measure_covariance
from .training_images import check_images
from .training_view import check_training, training_view

logger = logging.getLogger("perfusion")


def covariance_with_progress(clip: Any, captions: Sequence[str]) -> Covariance:
    """`measure_covariance` with a progress bar, interruptible after every batch."""
    progress = comfy.utils.ProgressBar(len(captions))

    def on_progress(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(done, total)

    return measure_covariance(clip, captions, on_progress)


def train(
    model: Any,
    clip: Any,
    vae: Any,
    images: Tensor,
    mask: Tensor | None,
    covariance: Covariance | None,
    config: TrainingConfig,
    captions: Sequence[str] = (),
) -> TrainingResult:
    """Train a concept with a progress bar; the models are afterwards what they were before.

    Without a covariance, one is measured on `captions` first. May be interrupted at every step.
    What was learned until then is saved beside the concepts, and so it is when training fails
    half-way.

    Raises:
        ValueError: for input that cannot be trained on, and when training met NaN.
    """
    words = config.superclass, config.placeholder
    # Measuring takes a while: what is wrong with the rest is said before.
    check_training(model, clip, *words)
    check_images(images)
    if covariance is None:
        covariance = covariance_with_progress(clip, captions)
    progress = comfy.utils.ProgressBar(config.steps)

    def on_step(step: int, loss: float) -> None:
        logger.debug("step %d of %d, loss %.5f", step, config.steps, loss)
        progress.update_absolute(step, config.steps)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def on_partial(result: TrainingResult) -> None:
        if result.steps:
            write_interrupted(result.concept)

    with training_view(model, clip, vae, images, mask, *words) as view:
        result = train_concept(view, config, covariance, on_step, on_partial)
    if result.error is not None:
        saved = f", saved as {write_interrupted(result.concept)}" if result.steps else ""
        raise ValueError(
            f"training stopped after {result.steps} good steps{saved}: {result.error}; check the "
            "images and the model's precision, or lower the learning rates"
        )
    return result
