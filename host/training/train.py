"""Training a concept inside a ComfyUI prompt: checked first, shown while it goes, nothing lost."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.utils
from torch import Tensor

from ...perfusion.concept.concept import Concept
from ...perfusion.gated.covariance import Covariance, Positions
from ...perfusion.training.config import TrainingConfig
from ...perfusion.training.results import TrainingResult
from ..files.concept_files import signed
from ..pictures.image_rows import training_rows
from ..pictures.training_images import TrainingImages, encode_images
from ..text.caption_sources import CaptionSource, built_in
from ..text.covariance import covariance_of
from .memory import MemoryEstimate, estimate_memory
from .options import TrainingOptions
from .private_copy import training_dtype
from .samples import Painter
from .selection import score_checkpoints
from .session import Session
from .view import check_training, training_view

logger = logging.getLogger("perfusion")


@dataclass(frozen=True, eq=False)
class Trained:
    """The concept to use, the whole run, its samples (1, H, W, 3) in 0..1, and a text about it."""

    concept: Concept
    result: TrainingResult
    samples: Tensor
    report: str


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
    images: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    covariance: Covariance | None,
    config: TrainingConfig,
    options: TrainingOptions | None = None,
    source: CaptionSource | None = None,
    clip_vision: Any = None,
) -> Trained:
    """Train a concept; the models are afterwards what they were before, whatever happens.

    `images` and `masks` as `training_images.encode_images` takes them. `options` come on top of
    `config`. Without a covariance, that of `source` (by default the built-in captions) is found on
    disk or measured first. With a CLIP vision model the best of the concepts that were sampled is
    returned, without it the last. May be interrupted anywhere: what was learned is then in the
    run's folder (`runs.Run`), from which the same training goes on.

    Raises:
        ValueError: for input that cannot be trained on, and when training met NaN.
        MemoryError: when memory does not suffice for one picture at a time.
    """
    options = options or TrainingOptions()
    config = config.with_settings(options)
    words = config.superclass, config.placeholder
    # Measuring and encoding take a while: what is wrong is said before.
    check_training(model, clip, *words)
    training_rows(images, masks, options.images.alpha)
    prompts = options.prompts_for(config.placeholder)
    if clip_vision is not None and not prompts:
        raise ValueError(
            "clip_vision: expected samples to choose the best checkpoint by, found sample_every "
            "0; set it to 50 or so, or disconnect clip_vision"
        )
    if covariance is None:
        covariance = covariance_with_progress(clip, source or built_in())
    pictures = encode_images(vae, images, masks, replace(options.images, seed=config.seed))
    memory = _memory(model, clip, vae, pictures, config, options)
    logger.log(logging.INFO if memory.fits else logging.WARNING, "%s", memory.statement())

    def sign(concept: Concept) -> Concept:
        return signed(concept, pictures.digest)

    painter, session = Painter(vae), None
    try:
        with training_view(
            *(model, clip, pictures, *words), options.precision, options.gradient_checkpointing
        ) as view:
            session = Session(view, painter, config, options, covariance, sign)
            result = session.train()
            found = [] if clip_vision is None else session.checkpoints()
            plain = session.plain_pictures() if found else None
    except Exception as error:
        if not comfy.model_management.is_oom(error):
            raise
        saved = "nothing was learned yet" if session is None else session.saved
        raise MemoryError(
            f"not enough memory to train, not even with one picture at once ({memory.statement()});"
            " switch gradient checkpointing on, make the resolution smaller, or use bf16 in the "
            f"training options; {saved}"
        ) from error
    if result.error is not None:
        session.keep_partial(result)
        raise ValueError(
            f"training stopped after {result.steps} good steps: {result.error}; check the images "
            f"and the model's precision, or lower the learning rates; {session.saved}"
        )
    concept, lines = sign(result.concept), _lines(session, result, memory)
    if plain is not None:
        selection = score_checkpoints(
            clip_vision, clip, found, images, session.settings.prompts, plain
        )
        concept = selection.best.concept
        lines += [f"chosen: step {selection.best.step}", selection.report]
    elif clip_vision is not None:
        lines.append("no sample could be drawn to choose by: the concept is that of the last step")
    session.finish()
    return Trained(concept, result, session.picture(), "\n".join(lines))


def _memory(
    model: Any,
    clip: Any,
    vae: Any,
    pictures: TrainingImages,
    config: TrainingConfig,
    options: TrainingOptions,
) -> MemoryEstimate:
    """What the largest of the pictures will need."""
    grids = ((latents.shape[-2], latents.shape[-1]) for latents in pictures.latents)
    return estimate_memory(
        *(model, clip, vae),
        rows=min(options.rows_at_once or config.batch_size, config.batch_size),
        latent=max(grids, key=lambda grid: grid[0] * grid[1]),
        dtype=training_dtype(model, options.precision),
        checkpointing=options.gradient_checkpointing,
    )


def _lines(session: Session, result: TrainingResult, memory: MemoryEstimate) -> list[str]:
    """What there is to say of a run that finished."""
    begun = f" (continued from step {session.began_at})" if session.began_at else ""
    smoothed = [means.mean for means in result.record.smoothed()]
    lines = [
        f"{result.steps} steps{begun}, smoothed loss {smoothed[0]:.4g} to {smoothed[-1]:.4g}",
        f"files: {session.run.folder}",
        memory.statement(),
    ]
    if session.run.problem:
        lines.append(session.run.problem)
    return lines
