"""Learning a concept from a few pictures (Perfusion, section 4; method section 3)."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..gated.covariance import Covariance
from ..gated.gate import Gate
from ..text.prompts import fill
from .config import Mode, RateSchedule, TrainingConfig
from .denoiser import Batch, Conditioning, Denoiser
from .learner import Learner, TrainingError
from .loss_bands import BandMeans, BandSmoother, LossRecord
from .state import TrainingState

logger = logging.getLogger("perfusion")

__all__ = [
    "Batch",
    "Conditioning",
    "Denoiser",
    "Mode",
    "Progress",
    "RateSchedule",
    "TrainingCallbacks",
    "TrainingConfig",
    "TrainingResult",
    "TrainingState",
    "train_concept",
    "training_fingerprint",
]


@dataclass(frozen=True)
class Progress:
    """After a step, counted from 1: its loss, and the running means of the timesteps' bands."""

    step: int
    loss: float
    smoothed: BandMeans


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """What a run learned: the concept after ``steps`` good steps, and the losses of each.

    ``state`` goes on from there. ``error`` is None, or says why training stopped early (NaN) with
    the concept as it was before.
    """

    concept: Concept
    record: LossRecord
    state: TrainingState
    error: str | None = None

    @property
    def steps(self) -> int:
        """How many good steps were done."""
        return self.state.step

    @cached_property
    def losses(self) -> tuple[float, ...]:
        """The loss of each step."""
        return self.record.per_step()


def _nothing(*_: object) -> None:
    pass


def _no(*_: object) -> bool:
    return False


@dataclass(frozen=True)
class TrainingCallbacks:
    """What a caller wants to hear and to say during training; anything may raise.

    ``on_step`` follows each step. ``on_sample(step, concept)`` is called before the first step,
    every ``config.sample_every`` steps and after the last; ``on_checkpoint(result)`` every
    ``config.checkpoint_every`` steps and after the last. ``should_stop()`` is asked before each
    step; True ends the run with what it has. ``is_out_of_memory`` tells such an exception from
    others; ``on_fewer_rows(n)`` is called before a step is tried again with at most n rows at once.
    ``on_partial(result)`` receives the last good state when an exception, BaseException included,
    is about to leave the run.
    """

    on_step: Callable[[Progress], None] = _nothing
    on_sample: Callable[[int, Concept], None] = _nothing
    on_checkpoint: Callable[[TrainingResult], None] = _nothing
    on_partial: Callable[[TrainingResult], None] = _nothing
    should_stop: Callable[[], bool] = _no
    is_out_of_memory: Callable[[Exception], bool] = _no
    on_fewer_rows: Callable[[int], None] = _nothing


def train_concept(
    denoiser: Denoiser,
    config: TrainingConfig,
    covariance: Covariance,
    callbacks: TrainingCallbacks | None = None,
    resume: TrainingState | None = None,
) -> TrainingResult:
    """Train a concept; everything of ``denoiser`` stays frozen.

    A NaN ends the training with a result whose ``error`` says so. Everything random comes from one
    generator seeded with ``config.seed``; a run that goes on from a state ``resume`` of the same
    `training_fingerprint` does, bit for bit, the steps that were left. A step for which memory does
    not suffice is tried again with half as many rows at once, down to one; so are all that follow.

    The superclass encoding, to which keys are locked and at which i and o_V start, is the mean
    over all templates (or captions) of the encoding of the superclass's last sub-word: the only
    one of its sub-words that has seen the whole word where text is encoded from left to right.

    Raises ValueError when there are no images, layers or prompts to work with, when the
    covariance was not measured with this model's encoder, and when ``resume`` is another run's.
    """
    callbacks = callbacks or TrainingCallbacks()
    run = _Run(denoiser, config, covariance, callbacks, resume)
    try:
        return run.until_the_end()
    except BaseException:
        # An interrupt is a BaseException; what was learned must not be lost with it.
        callbacks.on_partial(run.result())
        raise


def training_fingerprint(denoiser: Denoiser, config: TrainingConfig, covariance: Covariance) -> str:
    """Identifies what a run's steps depend on: settings, model, images, covariance."""
    of_data = denoiser.family, denoiser.encoder_hash, denoiser.data_hash, covariance.digest
    text = json.dumps([config.fingerprint(), of_data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Run:
    """One training run: draws batches, keeps the last good state, tells the caller."""

    def __init__(
        self,
        denoiser: Denoiser,
        config: TrainingConfig,
        covariance: Covariance,
        callbacks: TrainingCallbacks,
        resume: TrainingState | None,
    ) -> None:
        _check(denoiser, config, covariance)
        self.denoiser = denoiser
        self.config = config
        self.covariance = covariance
        self.callbacks = callbacks
        self.fingerprint = training_fingerprint(denoiser, config, covariance)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.learner = Learner(denoiser, config, covariance)
        self.rows_at_once = config.rows_at_once or config.batch_size
        self.losses: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.smoother = BandSmoother()
        if resume is not None:
            self._go_on_from(resume)
        self.good = self._snapshot()

    @property
    def steps(self) -> int:
        return len(self.losses)

    def until_the_end(self) -> TrainingResult:
        """Every step that is left."""
        config, callbacks = self.config, self.callbacks
        if config.sample_every and self.steps == 0:
            callbacks.on_sample(0, self.result().concept)
        while self.steps < config.steps:
            if callbacks.should_stop():
                logger.info("training of %s was stopped at step %d", config.placeholder, self.steps)
                break
            error = self._step()
            if error is not None:
                logger.warning("training of %s stopped: %s", config.placeholder, error)
                return self.result(error)
            if self._is_due(config.checkpoint_every):
                callbacks.on_checkpoint(self.result())
            if self._is_due(config.sample_every):
                callbacks.on_sample(self.steps, self.result().concept)
        return self.result()

    def result(self, error: str | None = None) -> TrainingResult:
        """The last good state as a concept."""
        size = self.config.batch_size
        record = LossRecord(_stacked(self.losses, size), _stacked(self.timesteps, size))
        return TrainingResult(self._concept(), record, self._state(record), error)

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.steps % every == 0 or self.steps == self.config.steps)

    def _step(self) -> str | None:
        """One optimiser step; returns why training cannot go on, or None."""
        batch, prompts = self._draw()
        while True:
            try:
                rate = self._decay()
                losses = self.learner.step(batch, prompts, self.rows_at_once, rate)
                break
            except TrainingError as error:
                self._back()
                return f"step {self.steps + 1}: {error}"
            except Exception as error:
                self._back()
                if self.rows_at_once < 2 or not self.callbacks.is_out_of_memory(error):
                    raise
            # Here and not in the handler, which would keep the failed step's tensors alive.
            self.rows_at_once = (self.rows_at_once + 1) // 2
            logger.warning("out of memory; trying %d pictures at once", self.rows_at_once)
            self.callbacks.on_fewer_rows(self.rows_at_once)
        self.losses.append(losses)
        self.timesteps.append(batch.timesteps)
        self.good = self._snapshot()
        smoothed = self.smoother.add(losses, batch.timesteps)
        self.callbacks.on_step(Progress(self.steps, float(losses.mean()), smoothed))
        return None

    def _draw(self) -> tuple[Batch, list[str]]:
        """Prompts, images and timesteps of a step; images in turn, timesteps stratified."""
        config, random = self.config, self.generator
        size, images = config.batch_size, self.denoiser.image_count
        chosen = torch.randint(len(config.templates), (size,), generator=random)
        rounds = math.ceil(size / images)
        turns = [torch.randperm(images, generator=random) for _ in range(rounds)]
        strata = torch.arange(size) + torch.rand(size, generator=random)
        indices = torch.cat(turns)[:size]
        batch = Batch(
            indices=indices,
            variants=torch.randint(self.denoiser.variant_count, (size,), generator=random),
            # The last stratum may round up to 1, which is outside the schedule.
            timesteps=(strata / size).clamp(max=1 - 2**-24),
            seeds=torch.randint(2**62, (size,), generator=random),
        )
        if config.captions:
            sentences = [config.captions[index] for index in indices.tolist()]
        else:
            sentences = [config.templates[index] for index in chosen.tolist()]
        return batch, [fill(sentence, config.placeholder) for sentence in sentences]

    def _decay(self) -> float:
        if self.config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * self.steps / self.config.steps))

    def _snapshot(self) -> _Good:
        learner = self.learner
        random = self.generator.get_state()
        return _Good(learner.tensors(), random, learner.scale, learner.since_scaled)

    def _back(self) -> None:
        """Undo a step that failed half-way; what was drawn for it stays drawn."""
        self.learner.optimizer.zero_grad()
        self.learner.restore(self.good.tensors, self.good.scale, self.good.since_scaled)

    def _state(self, record: LossRecord) -> TrainingState:
        good = self.good
        tensors = {name: tensor.to("cpu") for name, tensor in good.tensors.items()} | {
            "random": good.random,
            "losses": record.losses,
            "timesteps": record.timesteps,
        }
        return TrainingState(self.fingerprint, self.steps, tensors, good.scale, good.since_scaled)

    def _go_on_from(self, state: TrainingState) -> None:
        if state.fingerprint != self.fingerprint:
            raise ValueError(
                "expected a training state of the same model, pictures, words and settings, found "
                "another run's; train from the start, or set everything as it was"
            )
        self.learner.restore(state.tensors, state.scale, state.since_scaled)
        of_rows = (state.step, self.config.batch_size)
        shapes: dict[str, tuple[int, ...]] = {"losses": of_rows, "timesteps": of_rows}
        shapes["random"] = tuple(self.generator.get_state().shape)
        for name, shape in shapes.items():
            found = state.tensors.get(name)
            if found is None or tuple(found.shape) != shape:
                what = "nothing" if found is None else str(tuple(found.shape))
                raise ValueError(
                    f"the training state's {name}: expected {shape}, found {what}; it is damaged: "
                    "train from the start"
                )
        self.generator.set_state(state.tensors["random"])
        self.losses = list(state.tensors["losses"])
        self.timesteps = list(state.tensors["timesteps"])
        for row in zip(self.losses, self.timesteps, strict=True):
            self.smoother.add(*row)

    def _concept(self) -> Concept:
        config, good = self.config, self.good.tensors

        def learned(kind: str) -> dict[str, Tensor]:
            start = f"learned.{kind}."
            found = {k.removeprefix(start): v for k, v in good.items() if k.startswith(start)}
            return {name: tensor.to("cpu", copy=True) for name, tensor in found.items()}

        i = good["i"]
        settings = config.settings() | {"steps": self.steps, "images": self.denoiser.image_count}
        return Concept(
            family=self.denoiser.family,
            placeholder=config.placeholder,
            superclass=config.superclass,
            embeddings=learned("embedding"),
            i=i.float(),
            u=self.covariance.dual(i).float(),
            superclass_encoding=self.learner.superclass_encoding.cpu(),
            o_v=learned("v"),
            o_k=learned("k") if config.mode == "trained_keys" else None,
            # Textual inversion is the placeholder's vector alone: an edit of strength 0.
            gate=Gate(strength=1.0 if self.learner.edits else 0.0),
            train_gate=config.gate,
            metadata={
                "covariance_hash": self.covariance.digest,
                "encoder_hash": self.denoiser.encoder_hash,
                "training": json.dumps(settings, separators=(",", ":")),
            },
        )


@dataclass(frozen=True, eq=False)
class _Good:
    """What to go back to: learned tensors, random generator, loss scale after the last step."""

    tensors: dict[str, Tensor]
    random: Tensor
    scale: float
    since_scaled: int


def _stacked(rows: list[Tensor], size: int) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, size)


def _check(denoiser: Denoiser, config: TrainingConfig, covariance: Covariance) -> None:
    if denoiser.image_count < 1:
        raise ValueError("expected at least one training image, found none")
    if config.captions and len(config.captions) != denoiser.image_count:
        raise ValueError(
            f"expected a caption for each of the {denoiser.image_count} images, found "
            f"{len(config.captions)} captions; give as many, or none for the built-in sentences"
        )
    if not denoiser.layers:
        raise ValueError(
            f"expected cross-attention layers over text in the {denoiser.family} model, found none"
        )
    if covariance.encoder_hash != denoiser.encoder_hash:
        raise ValueError(
            f"expected a covariance of this model's text encoder ({denoiser.encoder_hash}), found "
            f"one of {covariance.encoder_hash}; measure it again with this model"
        )
    for index in range(denoiser.image_count):
        for variant in range(denoiser.variant_count):
            _check_mask(denoiser, index, variant)


def _check_mask(denoiser: Denoiser, index: int, variant: int) -> None:
    one = torch.tensor([index]), torch.tensor([variant])
    mask = denoiser.masks(Batch(*one, torch.zeros(1), torch.zeros(1, dtype=torch.int64)))
    if mask is None:
        return
    if not (bool(torch.isfinite(mask).all()) and float(mask.min()) >= 0 < float(mask.max())):
        raise ValueError(
            f"expected a mask of finite weights from 0 with some above it for image {index}, "
            f"found {float(mask.min())} to {float(mask.max())}"
        )
