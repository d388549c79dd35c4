"""Training a concept inside a ComfyUI prompt: checked first, shown while it goes, nothing lost."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.utils
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor

from ...perfusion.concept.concept import Concept
from ...perfusion.gated.covariance import Covariance, Positions
from ...perfusion.training.config import TrainingConfig
from ...perfusion.training.loss_bands import LossRecord
from ...perfusion.training.results import TrainingResult
from ..files.concept_files import signed
from ..interface.messages import tell
from ..models.families import family_of
from ..models.loaded import Models, pixels_per_latent
from ..models.networks import UNET
from ..pictures.image_rows import training_rows
from ..pictures.training_images import TrainingImages, encode_images
from ..text.caption_sources import CaptionSource, built_in
from ..text.covariance import covariance_of
from .memory import MemoryEstimate, estimate_memory
from .options import TrainingOptions
from .private_copy import training_dtype
from .samples import Painter
from .selection import Checkpoint, score_checkpoints
from .session import Session
from .view import check_training, training_view

logger = logging.getLogger("perfusion")


@dataclass(frozen=True, eq=False)
class Material:
    """What a concept is learned from.

    Attributes:
        images: the pictures, as `training_images.encode_images` takes them.
        masks: as it takes them, too.
        statistics: of the text encoder, or the captions to measure them on where they have not
            been found on disk; None for the built-in captions.
    """

    images: Sequence[Tensor]
    masks: Sequence[Tensor] | None = None
    statistics: Covariance | CaptionSource | None = None


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training made.

    Attributes:
        concept: the one to use.
        result: the whole run.
        samples: what was drawn, (1, H, W, 3) in 0..1.
        report: a text about it.
    """

    concept: Concept
    result: TrainingResult
    samples: Tensor
    report: str


def covariance_with_progress(
    clip: CLIP,
    source: CaptionSource,
    positions: Positions = "all",
    model: ModelPatcher | None = None,
) -> Covariance:
    """`covariance_of` with a progress bar, interruptible after every batch."""
    progress = comfy.utils.ProgressBar(source.count)

    def on_progress(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(done, total)

    return covariance_of(clip, source, on_progress, positions, model)


def train(
    models: Models,
    material: Material,
    config: TrainingConfig,
    options: TrainingOptions | None = None,
    clip_vision: ClipVisionModel | None = None,
) -> Trained:
    """Train a concept; the models are afterwards what they were before, whatever happens.

    `options` come on top of `config`. With a CLIP vision model the best of the concepts that were
    sampled is returned, without it the last. May be interrupted anywhere: what was learned is then
    in the run's folder (`runs.Run`), from which the same training goes on.

    Raises:
        ValueError: for input that cannot be trained on, and when training met NaN.
        MemoryError: when memory does not suffice for one picture at a time.
    """
    options = options or TrainingOptions()
    config = config.with_settings(options)
    # Measuring and encoding take a while: what is wrong is said before.
    _check(models, material, config, options, clip_vision is not None)
    task = _prepared(models, material, config, options)
    level = logging.INFO if task.memory.fits else logging.WARNING
    logger.log(level, "%s", task.memory.statement())
    learned = _learn(models, task, choose=clip_vision is not None)
    session, result = learned.session, learned.result
    if result.error is not None:
        session.keep_partial(result)
        raise ValueError(
            f"training stopped after {result.steps} good steps: {result.error}; check the images "
            f"and the model's precision, or lower the learning rates; {session.saved}"
        )
    concept = session.sign(result.concept)
    lines = _lines_about(learned, task.memory, task.pictures.lines)
    if clip_vision is not None and learned.plain is not None:
        selection = score_checkpoints(
            *(clip_vision, models.clip, learned.checkpoints, material.images),
            *(session.settings.prompts, learned.plain),
        )
        concept = selection.best.concept
        lines += [f"chosen: step {selection.best.step}", selection.report]
    elif clip_vision is not None:
        lines.append("no sample could be drawn to choose by: the concept is that of the last step")
    session.finish()
    return Trained(concept, result, session.picture(), "\n".join(lines))


@dataclass(frozen=True, eq=False)
class _Task:
    """All that training needs besides the models."""

    config: TrainingConfig
    options: TrainingOptions
    pictures: TrainingImages
    covariance: Covariance
    memory: MemoryEstimate


@dataclass(frozen=True, eq=False)
class _Learned:
    """A run that came to its end; with something to choose from, what the superclass draws."""

    session: Session
    result: TrainingResult
    checkpoints: list[Checkpoint]
    plain: Tensor | None


def _check(
    models: Models,
    material: Material,
    config: TrainingConfig,
    options: TrainingOptions,
    choose: bool,
) -> None:
    check_training(models.model, models.clip, config.superclass, config.placeholder)
    family = family_of(models.model.model)
    if family.network is not UNET and config.mode != "twin_lock":
        raise ValueError(
            f"{family.label} is trained with the twin lock only: its text encoders cannot be "
            "differentiated through, which other key locks need; choose key_lock twin"
        )
    training_rows(material.images, material.masks, options.images.alpha)
    if not options.prompts_for(config.placeholder) and choose:
        raise ValueError(
            "clip_vision: expected samples to choose the best checkpoint by, found sample_every "
            "0; set it to 50 or so, or disconnect clip_vision"
        )


def _prepared(
    models: Models, material: Material, config: TrainingConfig, options: TrainingOptions
) -> _Task:
    """The covariance, measured if need be, and the pictures, encoded."""
    covariance = material.statistics or built_in()
    if isinstance(covariance, CaptionSource):
        # Twin lock takes nothing from any token, so that its statistics need no padding, which some
        # encoders pad to hundreds of tokens.
        positions: Positions = "words" if config.mode == "twin_lock" else "all"
        covariance = covariance_with_progress(models.clip, covariance, positions, models.model)
    versions = replace(options.images, seed=config.seed)
    pictures = encode_images(
        *(models.vae, material.images, material.masks, versions),
        own_side=family_of(models.model.model).side * pixels_per_latent(models.vae),
        before_each=_encoding,
    )
    grids = ((latents.shape[-2], latents.shape[-1]) for latents in pictures.latents)
    memory = estimate_memory(
        models,
        rows=min(options.rows_at_once or config.batch_size, config.batch_size),
        # The largest of the pictures.
        latent=max(grids, key=lambda grid: grid[0] * grid[1]),
        dtype=training_dtype(models.model, options.precision),
        checkpointing=options.gradient_checkpointing,
        text_learns=config.mode != "twin_lock",
    )
    return _Task(config, options, pictures, covariance, memory)


def _encoding(at: int, count: int) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()
    tell(f"encoding picture {at + 1} of {count}")


def _learn(models: Models, task: _Task, choose: bool) -> _Learned:
    """The run itself, on private copies of the models."""
    config, options = task.config, task.options

    def sign(concept: Concept) -> Concept:
        return signed(concept, task.pictures.digest)

    painter, session = Painter(models.vae), None
    try:
        with training_view(
            *(models.model, models.clip, task.pictures, config.superclass, config.placeholder),
            *(options.precision, options.gradient_checkpointing),
        ) as view:
            session = Session(view, painter, config, options, task.covariance, sign)
            result = session.train()
            found = session.checkpoints() if choose else []
            plain = session.plain_pictures() if found else None
    except Exception as error:
        if not comfy.model_management.is_oom(error):
            raise
        saved = "nothing was learned yet" if session is None else session.saved
        raise MemoryError(
            "not enough memory to train, not even with one picture at once "
            f"({task.memory.statement()}); switch gradient checkpointing on, make the resolution "
            f"smaller, or use bf16 in the training options; {saved}"
        ) from error
    return _Learned(session, result, found, plain)


def _lines_about(learned: _Learned, memory: MemoryEstimate, pictures: Sequence[str]) -> list[str]:
    """What there is to say of a run that finished."""
    session, result = learned.session, learned.result
    begun = f" (continued from step {session.began_at})" if session.began_at else ""
    lines = [
        f"{result.steps} steps{begun}, {_loss_line(result.record)}",
        *pictures,
        f"files: {session.run.folder}",
        memory.statement(),
    ]
    if session.run.problem:
        lines.append(session.run.problem)
    return lines


def _loss_line(record: LossRecord) -> str:
    """How the loss went from the first quarter of the steps to the last.

    Compared within bands of noise levels: which were drawn says more about the loss of a step, and
    about a mean over few of them, than what was learned by then.
    """
    ends = [pair for pair in record.ends() if not math.isnan(pair[0])]
    if not ends:
        return "too few to say whether the loss fell"
    first, last = (sum(values) / len(ends) for values in zip(*ends, strict=True))
    bands = ", ".join(f"{before:.3g} to {after:.3g}" for before, after in ends)
    return (
        f"loss {first:.4g} in their first quarter, {last:.4g} in their last (from little noise to "
        f"much: {bands})"
    )
