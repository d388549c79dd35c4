"""The settings of a training run, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from ..gated.gate import Gate
from ..text.prompts import TEMPLATES, check_places, check_templates
from ..text.words import check_phrase, check_word
from .losses import Normalisation

Mode = Literal["perfusion", "textual_inversion", "trained_keys"]
RateSchedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one training run, checked when made. Defaults are the paper's.

    ``placeholder`` and ``superclass`` fill the ``{}`` of ``templates``. ``learning_rate`` is for
    the outputs, ``embedding_learning_rate`` for the token vectors. ``bias`` and ``temperature``
    are the gate during training, ``ema`` the decay of the target input i per step.
    ``captions``, one for each image and each with a ``{}``, take the place of ``templates``.
    ``background`` (0 to 1) is the least weight a masked pixel keeps, ``normalisation`` what a
    masked loss is divided by (see `losses.image_losses`). ``mode``: "perfusion", "trained_keys"
    (the paper's ablation) or "textual_inversion" (token vectors only, no edit; its concept has
    strength 0).

    The last three do not change what is learned, but for rounding: ``rows_at_once`` is the most
    rows computed together (0: all), ``checkpoint_every`` and ``sample_every`` the steps between
    two of those (0: none).
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
    schedule: RateSchedule = "constant"
    templates: tuple[str, ...] = TEMPLATES
    captions: tuple[str, ...] = ()
    normalisation: Normalisation = "subject"
    rows_at_once: int = 0
    checkpoint_every: int = 0
    sample_every: int = 0

    def __post_init__(self) -> None:
        check_word("placeholder", self.placeholder)
        check_phrase("superclass", self.superclass)
        if self.placeholder == self.superclass:
            raise ValueError(
                f"placeholder: expected another word than the superclass, found both "
                f"{self.placeholder!r}"
            )
        check_templates(self.templates)
        check_places("caption", self.captions)
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("rows_at_once", "checkpoint_every", "sample_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        for name in ("learning_rate", "embedding_learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0, found {value}")
        for name in ("ema", "background"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, found {getattr(self, name)}")
        self.gate  # noqa: B018 - its own checks
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected 0 to 2^64 - 1, found {self.seed}")
        choices_of = {"mode": Mode, "schedule": RateSchedule, "normalisation": Normalisation}
        for name, kind in choices_of.items():
            choices = get_args(kind)
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(choices)}, found {getattr(self, name)!r}"
                )

    @property
    def gate(self) -> Gate:
        """The gate during training."""
        return Gate(self.bias, self.temperature)

    def settings(self) -> dict[str, object]:
        """What a concept file records of the run (the words and the gate have their own keys).

        Only what differs from the defaults where a file of 32 kB has no room for more.
        """
        own = {"placeholder", "superclass", "bias", "temperature", *_CADENCE}
        for name in ("templates", "captions", "normalisation"):
            if getattr(self, name) == getattr(TrainingConfig, name):
                own.add(name)
        return {name: value for name, value in asdict(self).items() if name not in own}

    def fingerprint(self) -> dict[str, object]:
        """What decides each step: two runs equal in this can go on from each other's states.

        The number of steps is not part of it, unless the schedule depends on it: a run may be made
        longer.
        """
        left_out = {*_CADENCE} if self.schedule == "cosine" else {*_CADENCE, "steps"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}


_CADENCE = ("rows_at_once", "checkpoint_every", "sample_every")
