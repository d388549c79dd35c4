"""A personalised concept: the value itself. Its file is `save_concept` and `load_concept`."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .rank_one import Direction

KEY_LOCKS = ("local", "trained")
TEXT_LIMIT = 128


@dataclass(frozen=True, eq=False)
class Concept:
    """What training a concept leaves behind.

    ``family`` names the model family ("sd1", "sdxl", ...). ``placeholder`` is the word used in
    prompts. ``embeddings`` maps a text encoder ("l", "g", ...) to its token vector (dim,). ``i``,
    ``u`` and ``superclass_encoding`` have shape (D,). ``o_v`` maps a cross-attention's module path
    to its value output (d,); ``o_k`` holds trained keys and is None for keys locked to the
    superclass. ``bias``, ``temperature`` and ``strength`` are the gate at inference,
    ``train_bias`` and ``train_temperature`` the gate it was trained with. ``metadata`` carries
    everything else as text (hashes, training settings, modelspec keys, thumbnail).

    Raises ValueError when the pieces do not fit together.
    """

    family: str
    placeholder: str
    superclass: str
    embeddings: Mapping[str, Tensor]
    i: Tensor
    u: Tensor
    superclass_encoding: Tensor
    o_v: Mapping[str, Tensor]
    o_k: Mapping[str, Tensor] | None = None
    bias: float = 0.65
    temperature: float = 0.15
    strength: float = 1.0
    train_bias: float = 0.75
    train_temperature: float = 0.1
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def key_lock(self) -> str:
        """"local" for keys locked to the superclass, "trained" for learned ones."""
        return "local" if self.o_k is None else "trained"

    @property
    def layers(self) -> dict[str, int]:
        """Module path of every edited cross-attention -> d."""
        return {name: output.shape[0] for name, output in self.o_v.items()}

    @property
    def energy(self) -> float:
        """``i . u``."""
        return float(self.direction().energy)

    def with_gate(
        self,
        bias: float | None = None,
        temperature: float | None = None,
        strength: float | None = None,
    ) -> Concept:
        """The same concept with another inference gate; None keeps a value."""
        return replace(
            self,
            bias=self.bias if bias is None else bias,
            temperature=self.temperature if temperature is None else temperature,
            strength=self.strength if strength is None else strength,
        )

    def direction(self) -> Direction:
        """The gate and direction `rank_one` works with, named after the placeholder."""
        return Direction(
            i=self.i,
            u=self.u,
            bias=self.bias,
            temperature=self.temperature,
            strength=self.strength,
            name=self.placeholder,
        )


class ConceptFileError(ValueError):
    """A concept file that cannot be used; the message names file, key, expected and found."""


def save_concept(concept: Concept, path: Path | str, dtype: torch.dtype = torch.float16) -> Path:
    """Write a concept as .safetensors, atomically; returns the path written."""
    raise NotImplementedError


def load_concept(path: Path | str) -> Concept:
    """Read a concept file, trusting nothing in it. Raises `ConceptFileError`."""
    raise NotImplementedError
