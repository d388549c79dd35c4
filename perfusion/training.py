"""Learning a concept from a few pictures (Perfusion, section 4; method section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .concept import Concept
from .covariance import Covariance
from .denoiser import Batch, Denoiser, Encoded
from .prompts import TEMPLATES

__all__ = ["Batch", "Denoiser", "Encoded", "TrainingConfig", "TrainingResult", "train_concept"]

Mode = Literal["perfusion", "textual_inversion", "trained_keys"]
Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one training run, checked when made. Defaults are the paper's.

    ``placeholder`` and ``superclass`` fill the ``{}`` of ``templates``. ``learning_rate`` is for
    the outputs, ``embedding_learning_rate`` for the token vectors. ``bias`` and ``temperature``
    are the gate during training, ``ema`` the decay of the target input i per step.
    ``background`` (0 to 1) is the least weight a masked pixel keeps. ``mode``: "perfusion",
    "trained_keys" (the paper's ablation) or "textual_inversion" (token vectors only, no edit; its
    concept has strength 0).
    """

    placeholder: str
    superclass: str
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 0.03
    embedding_learning_rate: float = 0.006
    bias: float = 0.75
    temperature: float = 0.1
    ema: float = 0.99
    background: float = 0.0
    seed: int = 0
    mode: Mode = "perfusion"
    schedule: Schedule = "constant"
    templates: tuple[str, ...] = TEMPLATES


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """What a run learned: the concept after ``steps`` good steps, and the loss of each.

    ``error`` is None, or says why training stopped early (NaN) with the concept as it was before.
    """

    concept: Concept
    losses: tuple[float, ...]
    steps: int
    error: str | None = None


def train_concept(
    denoiser: Denoiser,
    config: TrainingConfig,
    covariance: Covariance,
    on_step: Callable[[int, float], None] | None = None,
    on_partial: Callable[[TrainingResult], None] | None = None,
) -> TrainingResult:
    """Train a concept; everything of ``denoiser`` stays frozen.

    ``on_step(step, loss)`` is called after each step, counted from 1, and may raise. Whatever is
    raised, from there or from the denoiser, BaseException included, ``on_partial(result)``
    receives the last good state first and the exception then goes on its way. A NaN ends the
    training with a result whose ``error`` says so. Everything random comes from one generator
    seeded with ``config.seed``.
    """
    raise NotImplementedError
