"""What ControlNets read: the everyday word, not a vector they were never trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..text.twin import placeholders_in, untwined

# ComfyUI's own name for an encoding meant for ControlNets only.
_FOR_CONTROL = "cross_attn_controlnet"


def give_superclass_encodings(conditionings: Sequence[dict[str, Any]]) -> None:
    """Let the ControlNets of a run read its prompts with the superclass words.

    All conditionings get such an entry, so that they still run in one batch; those of a graph
    that sets it itself keep theirs.
    """
    controlled = any(each.get("control") is not None for each in conditionings)
    if not controlled or not any(placeholders_in(each.get("cross_attn")) for each in conditionings):
        return
    for each in conditionings:
        encodings = each.get("cross_attn")
        if isinstance(encodings, Tensor) and each.get(_FOR_CONTROL) is None:
            each[_FOR_CONTROL] = untwined(encodings)[1]
