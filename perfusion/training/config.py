"""The settings of a training run, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, get_args

from ..gated.covariance import Positions
from ..gated.gate import TRAINING_GATE, Gate
from ..text.prompts import TEMPLATES, check_places, check_templates
from ..text.words import check_phrase, check_word
from .losses import Normalisation

Mode = Literal["twin_lock", "perfusion", "textual_inversion", "trained_keys"]
RateSchedule = Literal["constant", "cosine"]
RateUnit = Literal["relative", "absolute"]
VectorStart = Literal["random", "superclass"]

DEFAULT_MODE: Mode = "perfusion"
"""What is trained where nobody says."""


def counted_positions(mode: Mode) -> Positions:
    """Which tokens the covariance should count for a training.

    Twin lock takes nothing from any token, and its statistics need no padding, which some encoders
    pad to hundreds of tokens. The other locks subtract a share of i at every token.
    """
    return "words" if mode == "twin_lock" else "all"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of a training that have nothing to do with what it learns. Defaults: the paper's.

    Attributes:
        bias: beta of the gate during training.
        temperature: tau of the gate during training.
        ema: decay of the target input i per step, 0 to 1.
        background: the least weight a masked pixel keeps, 0 to 1.
        normalisation: what a masked loss is divided by (`losses.image_losses`).
        schedule: the learning rates over the steps.
        rate_unit: "relative" counts learning rates in the size of what is learned (`rates`);
            "absolute" takes them as they are, as the paper does (with 0.03 and 0.006).
        templates: sentences to train with, each with one ``{}``.
        rows_at_once: the most rows computed together, 0 for all. This and the next two do not
            change what is learned, but for rounding.
        checkpoint_every: steps between two checkpoints, 0 for none.
        sample_every: steps between two samples, 0 for none.

    Raises:
        ValueError: naming the setting that cannot be.
    """

    bias: float = TRAINING_GATE.bias
    temperature: float = TRAINING_GATE.temperature
    ema: float = 0.99
    background: float = 0.0
    normalisation: Normalisation = "subject"
    schedule: RateSchedule = "constant"
    rate_unit: RateUnit = "relative"
    templates: tuple[str, ...] = TEMPLATES
    rows_at_once: int = 0
    checkpoint_every: int = 0
    sample_every: int = 0

    def __post_init__(self) -> None:
        check_templates(self.templates)
        for name in CADENCE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        for name in ("ema", "background"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, found {getattr(self, name)}")
        self.gate  # noqa: B018 - its own checks
        check_choices(self, schedule=RateSchedule, normalisation=Normalisation, rate_unit=RateUnit)

    @property
    def gate(self) -> Gate:
        """The gate during training."""
        return Gate(self.bias, self.temperature)


@dataclass(frozen=True)
class TrainingConfig(TrainingSettings):
    """One training run, checked when made.

    Attributes:
        placeholder: fills the ``{}`` of templates and captions, and is learned.
        superclass: the everyday word for the thing, where it starts.
        steps: how many.
        batch_size: B, rows in a step.
        learning_rate: of the outputs.
        embedding_learning_rate: of the token vectors, where they are learned.
        seed: decides all that is random, 0 to 2^64 - 1.
        vector_start: where a vector that is learned beside outputs starts: "random" at a fixed
            random one of the superclass's norm, which leaves the everyday word alone (method
            section 3); "superclass" as in the paper.
        mode: "twin_lock" (values only; the prompt reads as its superclass), "perfusion" (the
            paper's, with the local key lock), "trained_keys" (the paper's ablation) or
            "textual_inversion" (token vectors only, no edit; its concept has strength 0).
        captions: one for each image, each with a ``{}``; they take the place of the templates.

    Raises:
        ValueError: naming the setting that cannot be.
    """

    placeholder: str
    superclass: str
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 0.125
    embedding_learning_rate: float = 0.09
    seed: int = 0
    mode: Mode = DEFAULT_MODE
    vector_start: VectorStart = "random"
    captions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word("placeholder", self.placeholder)
        check_phrase("superclass", self.superclass)
        if self.placeholder == self.superclass:
            raise ValueError(
                f"placeholder: expected another word than the superclass, found both "
                f"{self.placeholder!r}"
            )
        check_places("caption", self.captions)
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("learning_rate", "embedding_learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0, found {value}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected 0 to 2^64 - 1, found {self.seed}")
        check_choices(self, mode=Mode, vector_start=VectorStart)

    @property
    def edits(self) -> bool:
        """Whether projections are edited, not the placeholder's vector alone learned."""
        return self.mode != "textual_inversion"

    @property
    def learns_vector_and_outputs(self) -> bool:
        """Whether a vector is learned beside outputs, as in the paper."""
        return self.mode in ("perfusion", "trained_keys")

    def with_settings(self, settings: TrainingSettings) -> TrainingConfig:
        """The same run with other settings; those of a class derived from them do, too."""
        names = [field.name for field in fields(TrainingSettings)]
        return replace(self, **{name: getattr(settings, name) for name in names})

    def settings(self) -> dict[str, object]:
        """What a concept file records of the run (the words and the gate have their own keys).

        The last ones only where they differ from what is usual: a file of 32 kB has no room for
        more.
        """
        usual = {name: getattr(TrainingConfig, name) for name in _SELDOM} | self._unsaid()
        kept = [name for name, value in usual.items() if getattr(self, name) != value]
        return {name: getattr(self, name) for name in (*_RECORDED, *kept)}

    def fingerprint(self) -> dict[str, object]:
        """What decides each step: two runs equal in this can go on from each other's states.

        The number of steps is not part of it, unless the schedule depends on it: a run may be made
        longer.
        """
        left_out = {*CADENCE} if self.schedule == "cosine" else {*CADENCE, "steps"}
        left_out |= {name for name, value in self._unsaid().items() if getattr(self, name) == value}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def _unsaid(self) -> dict[str, object]:
        """What a run did that says nothing of it: one of before there was a choice."""
        start = "superclass" if self.learns_vector_and_outputs else self.vector_start
        return {"rate_unit": "absolute", "vector_start": start}


def check_choices(settings: object, **kinds: object) -> None:
    """Raise ValueError for a setting that is none of its ``Literal``'s values."""
    for name, kind in kinds.items():
        choices, found = get_args(kind), getattr(settings, name)
        if found not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {found!r}")


CADENCE = ("rows_at_once", "checkpoint_every", "sample_every")
_RECORDED = (
    *("steps", "batch_size", "learning_rate", "embedding_learning_rate", "ema", "background"),
    *("seed", "mode", "schedule"),
)
_SELDOM = ("templates", "captions", "normalisation")
