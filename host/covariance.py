"""Measuring the covariance of a CLIP's encodings over captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..perfusion.covariance import Covariance, CovarianceAccumulator
from .text import TextEncoders

BATCH = 32


def measure_covariance(
    clip: Any,
    captions: Sequence[str],
    on_progress: Callable[[int, int], None] | None = None,
) -> Covariance:
    """Second moment of the encodings of words and end tokens, batch after batch.

    `clip` is measured as it conditions a model: with its clip skip, LoRA and concatenation.
    `on_progress(done, total)` is called after each batch and may raise.

    Raises:
        ValueError: when no caption has a word in it.
    """
    wanted = [caption for caption in captions if caption.strip()]
    if not wanted:
        raise ValueError("expected captions to measure the covariance on, found none")
    text = TextEncoders(clip)
    statistics = CovarianceAccumulator(text.family.width, "words", text.digest())
    for start in range(0, len(wanted), BATCH):
        tokens = []
        for caption in wanted[start : start + BATCH]:
            sections = text.sections(caption)
            count = min(len(found) for found in sections.values())
            tokens += [{name: found[at] for name, found in sections.items()} for at in range(count)]
        mask = torch.stack([text.word_mask(section) for section in tokens])
        with torch.no_grad():
            encodings = text.encode(tokens).encodings
        statistics.add(encodings, mask[:, : encodings.shape[1]])
        if on_progress is not None:
            on_progress(min(start + BATCH, len(wanted)), len(wanted))
    return statistics.result()
