"""Inputs of a node that receives lists, such as those of ComfyUI's dataset nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def only(name: str, values: Sequence[T]) -> T:
    """The value of an input that is one value.

    Raises:
        ValueError: when something upstream made a list of another length of it.
    """
    if len(values) != 1:
        raise ValueError(
            f"{name}: expected one value, found a list of {len(values)}; only images, mask and "
            "captions may be lists"
        )
    return values[0]


def first_or_none(name: str, values: Sequence[T] | None) -> T | None:
    """The value of an optional input that is one value, None when nothing is connected."""
    return None if values is None else only(name, values)
