"""Texts that hold one thing a line."""

from __future__ import annotations


def lines_of(text: str) -> tuple[str, ...]:
    """The lines of a text that are not empty, without the spaces around them."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())
