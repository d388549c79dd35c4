"""Tokens whose vectors are rows of a table in the diffusion model (see `models.query_adapter`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ..models.query_adapter import QueryRow, QueryRows
from .marked_words import takes_place_of


def without_vectors(tokens: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Any]:
    """Tokens with ids in place of the vectors of these tokenizers.

    Args:
        tokens: what a CLIP's `tokenize` gives: name -> sections of (token, weight, ...).
        names: of the tokenizers.
    """
    if not names:
        return tokens
    return {
        name: [[(_id(entry[0]), *entry[1:]) for entry in section] for section in sections]
        if name in names
        else sections
        for name, sections in tokens.items()
    }


def query_rows(tokens: Mapping[str, Any], names: Collection[str]) -> QueryRows:
    """The vectors of these tokenizers in a prompt's first section, which is all that is read."""
    return tuple(
        QueryRow(position, entry[0], takes_place_of(entry[0]))
        for name in names
        for position, entry in enumerate(tokens[name][0])
        if isinstance(entry[0], Tensor)
    )


def _id(token: Any) -> Any:
    found = takes_place_of(token)
    return found[0] if found else token
