"""Training a concept inside a ComfyUI prompt: progress, interrupts, nothing lost."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import comfy.utils
from torch import Tensor

from ..perfusion.covariance import Covariance, Positions
from ..perfusion.training import Progress, TrainingCallbacks, TrainingResult, train_concept
from ..perfusion.training_config import TrainingConfig
from .caption_sources import CaptionSource, built_in
from .concept_files import write_interrupted
from .covariance import covariance_of
from .training_images import check_images, encode_images
from .training_view import check_training, training_view

logger = logging.getLogger("perfusion")


def covariance_with_progress(
    clip: Any, source: CaptionSource, positions: Positions = "words"
) -> Covariance:
    """`covariance_of` with a progress bar, interruptible after every batch."""
    progress = comfy.utils.ProgressBar(source.count)

    def on_progress(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(done, total)

    return covariance_of(clip, source, on_progress, positions)


def train(
    model: Any,
    clip: Any,
    vae: Any,
    images: Tensor,
    mask: Tensor | None,
    covariance: Covariance | None,
    config: TrainingConfig,
    source: CaptionSource | None = None,
) -> TrainingResult:
    """Train a concept with a progress bar; the models are afterwards what they were before.

    Without a covariance, that of `source` (by default the built-in captions) is found on disk or
    measured first. May be interrupted at every step.
    What was learned until then is saved beside the concepts, and so it is when training fails
    half-way.

    Raises:
        ValueError: for input that cannot be trained on, and when training met NaN.
    """
    words = config.superclass, config.placeholder
    # Measuring takes a while: what is wrong with the rest is said before.
    check_training(model, clip, *words)
    check_images([images])
    if covariance is None:
        covariance = covariance_with_progress(clip, source or built_in())
    progress = comfy.utils.ProgressBar(config.steps)

    def on_step(done: Progress) -> None:
        logger.debug("step %d of %d, loss %.5f", done.step, config.steps, done.smoothed.mean)
        progress.update_absolute(done.step, config.steps)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def on_partial(result: TrainingResult) -> None:
        if result.steps:
            write_interrupted(result.concept)

    pictures = encode_images(vae, [images], None if mask is None else [mask])
    with training_view(model, clip, pictures, *words) as view:
        callbacks = TrainingCallbacks(on_step=on_step, on_partial=on_partial)
        result = train_concept(view, config, covariance, callbacks)
    if result.error is not None:
        saved = f", saved as {write_interrupted(result.concept)}" if result.steps else ""
        raise ValueError(
            f"training stopped after {result.steps} good steps{saved}: {result.error}; check the "
            "images and the model's precision, or lower the learning rates"
        )
    return result
