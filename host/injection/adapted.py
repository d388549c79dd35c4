"""Prompts with concepts through a model's own adapter, before sampling begins."""

from __future__ import annotations

from typing import Any

from comfy.model_base import BaseModel

from ..models.query_adapter import QUERIES, QueryAdapter, as_condition
from ..text.twin import TwinEncoding, placeholders_in, untwined, with_twin, within_twin
from .dispatch import ModelCall


def around_conditions(original: ModelCall, model: BaseModel, **conditioning: Any) -> dict[str, Any]:
    """Around a model's `extra_conds`: a prompt and its twin are adapted, each with its queries.

    A conditioning without a concept's vector takes exactly the stock path.
    """
    rows, encodings = conditioning.get(QUERIES), conditioning.get("cross_attn")
    if rows is None or encodings is None:
        return original(**conditioning)
    made = original(**{**conditioning, "cross_attn": None})
    adapter = QueryAdapter(model, conditioning["device"])
    prompt, twin = untwined(encodings)
    read = adapter.prompt(prompt, conditioning, rows)
    if isinstance(encodings, TwinEncoding):
        other = adapter.twin(twin, conditioning, rows)
        words = placeholders_in(encodings)
        pair = (other, read) if encodings.twin_first else (read, other)
        read = (within_twin if encodings.twin_first else with_twin)(*pair, words)
    made["c_crossattn"] = as_condition(read)
    return made
