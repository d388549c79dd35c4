"""Learning a concept from a few pictures (Perfusion, section 4; method section 3)."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gated.covariance import Covariance
from .checks import check_inputs
from .config import TrainingConfig
from .denoiser import Denoiser
from .draws import draw, rate
from .learned import learned_concept
from .learner import Learner
from .lock import TrainingError
from .loss_bands import BandSmoother, LossRecord
from .results import Progress, TrainingCallbacks, TrainingResult
from .state import TrainingState, check_same_run

logger = logging.getLogger("perfusion")


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

    Raises:
        ValueError: when there are no images, layers or prompts to work with, when the covariance
            was not measured with this model's encoder, and when ``resume`` is another run's.
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
        check_inputs(denoiser, config, covariance)
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
        concept = learned_concept(self.learner, self.good.tensors, self.steps)
        return TrainingResult(concept, record, self._state(record), error)

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.steps % every == 0 or self.steps == self.config.steps)

    def _step(self) -> str | None:
        """One optimiser step; returns why training cannot go on, or None."""
        denoiser = self.denoiser
        batch, prompts = draw(
            self.config, denoiser.image_count, denoiser.variant_count, self.generator
        )
        while True:
            try:
                share = rate(self.config, self.steps)
                losses = self.learner.step(batch, prompts, self.rows_at_once, share)
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
        like = self.generator.get_state()
        check_same_run(state, self.fingerprint, self.config.batch_size, like)
        self.learner.restore(state.tensors, state.scale, state.since_scaled)
        self.generator.set_state(state.tensors["random"])
        self.losses = list(state.tensors["losses"])
        self.timesteps = list(state.tensors["timesteps"])
        for row in zip(self.losses, self.timesteps, strict=True):
            self.smoother.add(*row)


@dataclass(frozen=True, eq=False)
class _Good:
    """What to go back to: learned tensors, random generator, loss scale after the last step."""

    tensors: dict[str, Tensor]
    random: Tensor
    scale: float
    since_scaled: int


def _stacked(rows: list[Tensor], size: int) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, size)
