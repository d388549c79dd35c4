"""What a person may choose about a training beside its few main settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from ...perfusion.text.prompts import TEMPLATES
from ...perfusion.training.config import RateSchedule, TrainingConfig
from ...perfusion.training.losses import Normalisation
from ..pictures.training_images import ImageOptions
from .private_copy import Precision

Resume = Literal["unfinished", "always", "never"]

SAMPLE_PROMPTS = ("a photo of a {}", "a photo of a {} on the beach")


@dataclass(frozen=True)
class TrainingOptions:
    """Checked when made; the defaults are what training does without any.

    Attributes:
        precision: what the model computes in (`private_copy.training_dtype`).
        gradient_checkpointing: less memory for more time.
        rows_at_once: pictures computed together, 0 for all of a batch.
        sample_every: steps between two samples, 0 for none; `sample_prompts` hold ``{}`` or the
            placeholder, `sample_steps`, `sample_cfg` and `sample_seed` are a KSampler's.
        checkpoint_every: steps between two checkpoints on disk, 0 for none but at an interrupt.
        resume: "unfinished" goes on with a run that was cut off, "always" also with a finished
            one that is made longer (with a constant schedule), "never" starts anew.
        background, normalisation: how masks weigh (`losses.image_losses`).
        images: how pictures are brought to size and varied; its seed is the training's.
        schedule, bias, temperature, ema, templates: see `TrainingConfig`.
    """

    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    rows_at_once: int = 0
    sample_every: int = 100
    sample_prompts: tuple[str, ...] = SAMPLE_PROMPTS
    sample_steps: int = 20
    sample_cfg: float = 5.0
    sample_seed: int = 0
    checkpoint_every: int = 50
    resume: Resume = "unfinished"
    background: float = 0.0
    normalisation: Normalisation = "subject"
    images: ImageOptions = field(default_factory=ImageOptions)
    schedule: RateSchedule = "cosine"
    bias: float = TrainingConfig.bias
    temperature: float = TrainingConfig.temperature
    ema: float = TrainingConfig.ema
    templates: tuple[str, ...] = TEMPLATES

    def __post_init__(self) -> None:
        # Its own checks cover most of the fields.
        self.applied_to(TrainingConfig("<thing>", "thing"))
        choices_of = {"precision": Precision, "resume": Resume}
        for name, kind in choices_of.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name}: expected one of {', '.join(get_args(kind))}, "
                    f"found {getattr(self, name)!r}"
                )
        if self.sample_steps < 1:
            raise ValueError(f"sample_steps: expected at least 1, found {self.sample_steps}")
        if self.sample_every and not self.sample_prompts:
            raise ValueError(
                "sample_prompts: expected at least one with samples every "
                f"{self.sample_every} steps, found none; set sample_every to 0 for no samples"
            )

    def applied_to(self, config: TrainingConfig) -> TrainingConfig:
        """The same run with these settings."""
        return replace(
            config,
            rows_at_once=self.rows_at_once,
            sample_every=self.sample_every,
            checkpoint_every=self.checkpoint_every,
            background=self.background,
            normalisation=self.normalisation,
            schedule=self.schedule,
            bias=self.bias,
            temperature=self.temperature,
            ema=self.ema,
            templates=self.templates,
        )

    def prompts_for(self, placeholder: str) -> tuple[str, ...]:
        """The sample prompts with the placeholder in them; none when there are no samples.

        Raises:
            ValueError: naming a prompt without the concept.
        """
        if not self.sample_every:
            return ()
        # Prompts know it in whatever case; from here on it is written in one way.
        word = re.compile(re.escape(placeholder), re.IGNORECASE)
        found = tuple(
            word.sub(lambda _: placeholder, prompt.replace("{}", placeholder))
            for prompt in self.sample_prompts
        )
        for number, prompt in enumerate(found, 1):
            if placeholder not in prompt:
                raise ValueError(
                    f"sample prompt {number}: expected {{}} or {placeholder} where the thing is "
                    f"named, found {prompt!r}"
                )
        return found


def lines_of(text: str) -> tuple[str, ...]:
    """The lines of a text that are not empty."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def captions_of(texts: Sequence[str], count: int) -> tuple[str, ...]:
    """A caption for each of `count` pictures: one a text, or one text with one a line.

    Raises:
        ValueError: when there are not as many.
    """
    lines = lines_of(texts[0]) if len(texts) == 1 else tuple(text.strip() for text in texts)
    if len(lines) != count:
        raise ValueError(
            f"captions: expected one for each of the {count} images, found {len(lines)}; give as "
            "many (a list, or one a line), or none for the built-in sentences"
        )
    return lines
