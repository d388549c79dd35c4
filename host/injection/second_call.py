"""A model call that reads two encodings: both prompts and both twins as one row of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.second_text import SecondText, joined
from ..text.twin import TwinEncoding, untwined


def names_a_concept(second: SecondText | None, first: Any, given: dict[str, Any]) -> bool:
    """Whether a prompt of the call was encoded twice, in one of the two encodings at least."""
    if isinstance(first, TwinEncoding):
        return True
    return second is not None and isinstance(given.get(second.read), TwinEncoding)


def with_second(
    second: SecondText,
    pair: tuple[Tensor, Tensor],
    given: dict[str, Any],
    cast: Callable[[Tensor], Tensor],
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Prompts and twins (B, N1 + N2, D1 + D2) of a call, and what the model is to be given.

    Padding, which is not read, is that of the twins in both.

    Args:
        second: where the second encoding is.
        pair: of the first, as the model will read it.
        given: the call's other arguments.
        cast: brings encodings where and to what the model reads.
    """
    behind = tuple(cast(each) for each in untwined(given[second.read]))
    prompt, twin = (joined(*each) for each in zip(pair, behind, strict=True))
    words = second.words_of_call(given).to(twin.device)
    return (torch.where(words, prompt, twin), twin), {**given, second.read: behind[1]}
