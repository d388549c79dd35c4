"""What is random in a training step, and how fast it learns."""

from __future__ import annotations

import math

import torch

from ..text.prompts import fill
from .config import TrainingConfig
from .denoiser import Batch


def draw(
    config: TrainingConfig, images: int, variants: int, random: torch.Generator
) -> tuple[Batch, list[str]]:
    """The batch of a step and its prompts (B,), with the placeholder in them.

    Images come in turn, timesteps stratified: one in each of B equal parts of [0, 1).
    """
    size = config.batch_size
    chosen = torch.randint(len(config.templates), (size,), generator=random)
    turns = [torch.randperm(images, generator=random) for _ in range(math.ceil(size / images))]
    strata = torch.arange(size) + torch.rand(size, generator=random)
    indices = torch.cat(turns)[:size]
    batch = Batch(
        indices=indices,
        variants=torch.randint(variants, (size,), generator=random),
        # The last stratum may round up to 1, which is outside the schedule.
        timesteps=(strata / size).clamp(max=1 - 2**-24),
        seeds=torch.randint(2**62, (size,), generator=random),
    )
    if config.captions:
        sentences = [config.captions[index] for index in indices.tolist()]
    else:
        sentences = [config.templates[index] for index in chosen.tolist()]
    return batch, [fill(sentence, config.placeholder) for sentence in sentences]


def rate(config: TrainingConfig, done: int) -> float:
    """What the learning rates are multiplied with after ``done`` steps."""
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * done / config.steps))
