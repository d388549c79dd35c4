"""What a person may choose about a training beside its few main settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ...perfusion.text.lines import lines_of
from ...perfusion.training.config import RateSchedule, TrainingSettings, check_choices
from ..pictures.training_images import ImageOptions
from .private_copy import Precision

Resume = Literal["unfinished", "always", "never"]

SAMPLE_PROMPTS = ("a photo of a {}", "a photo of a {} on the beach")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(TrainingSettings):
    """Settings of a training and of how it goes on here; the defaults are what it does without.

    Attributes:
        precision: what the model computes in (`private_copy.training_dtype`).
        gradient_checkpointing: less memory for more time.
        sample_prompts: what is drawn, with ``{}`` or the placeholder.
        sample_steps: a KSampler's steps.
        sample_cfg: a KSampler's cfg.
        sample_seed: a KSampler's seed.
        resume: "unfinished" goes on with a run that was cut off, "always" also with a finished
            one that is made longer (with a constant schedule), "never" starts anew.
        images: how pictures are brought to size and varied; its seed is the training's.

    Raises:
        ValueError: naming the setting that cannot be.
    """

    schedule: RateSchedule = "cosine"
    checkpoint_every: int = 50
    sample_every: int = 100
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    sample_prompts: tuple[str, ...] = SAMPLE_PROMPTS
    sample_steps: int = 20
    sample_cfg: float = 5.0
    sample_seed: int = 0
    resume: Resume = "unfinished"
    images: ImageOptions = field(default_factory=ImageOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, precision=Precision, resume=Resume)
        if self.sample_steps < 1:
            raise ValueError(f"sample_steps: expected at least 1, found {self.sample_steps}")
        if self.sample_every and not self.sample_prompts:
            raise ValueError(
                "sample_prompts: expected at least one with samples every "
                f"{self.sample_every} steps, found none; set sample_every to 0 for no samples"
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
