"""What a placeholder stands for under twin lock: its superclass, but for one vector.

The superclass's own sub-words come first, as they are, and the concept's vector stands in place
of the last one. So a prompt is as long as its twin, token for token, and the two differ there
alone (and, in a causal encoder, in what is read after it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.sd import CLIP
from torch import Tensor

from ..models.families import encoder_label, encoder_models, tokenizer_of
from .text_encoders import word_tokens


@dataclass(frozen=True, eq=False)
class SuperclassWords:
    """The superclass as one text encoder reads it.

    Attributes:
        tokens: ids (n) of its sub-words, what the twin has in a placeholder's place.
        rows: their rows (n, dim) of the token table, fp32, on the CPU.
    """

    tokens: tuple[int, ...]
    rows: Tensor

    def with_vector(self, vector: Tensor) -> Tensor:
        """What a placeholder stands for: rows (n, dim), the last of them `vector` (dim,)."""
        return torch.cat([self.rows[:-1], vector.detach().to("cpu", torch.float32)[None]])


def twin_seed(placeholder: str, encoder_name: str) -> int:
    """The seed of a placeholder's vector for one text encoder ("l", "g", ...).

    A concept file has the placeholder in its metadata, and with it the seed. Placeholders match
    whatever their case, so the seed does not depend on it.
    """
    digest = hashlib.sha256(f"{placeholder.lower()}\n{encoder_name}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def twin_vector(placeholder: str, encoder_name: str, like: Tensor) -> Tensor:
    """The fixed random vector (dim,) fp32 that names a concept, of the norm of `like` (dim,).

    Standard normal before it is scaled; `like` is the superclass's last sub-word.
    """
    generator = torch.Generator().manual_seed(twin_seed(placeholder, encoder_name))
    drawn = torch.randn(like.shape, generator=generator)
    return drawn * (like.detach().to("cpu", torch.float32).norm() / drawn.norm())


def superclass_words(clip: CLIP, superclass: str) -> dict[str, SuperclassWords]:
    """Text encoder -> the superclass as it reads it.

    Raises:
        ValueError: for a superclass that an encoder makes nothing of, or more sub-words than its
            tokenizer keeps together in a long prompt.
    """
    encoders = encoder_models(clip)
    return {name: _words(clip, name, encoder, superclass) for name, encoder in encoders.items()}


def served_rows(
    words: Mapping[str, SuperclassWords], vectors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Text encoder -> the rows (n, dim) to serve for a placeholder of these vectors (dim,)."""
    return {name: each.with_vector(vectors[name]) for name, each in words.items()}


def _words(clip: CLIP, name: str, encoder: Any, superclass: str) -> SuperclassWords:
    tokenizer = tokenizer_of(clip, name)
    tokens = word_tokens(tokenizer, superclass)
    # From that length on a tokenizer breaks words where a section is full.
    most = tokenizer.max_word_length - 1
    if not 0 < len(tokens) <= most:
        raise ValueError(
            f"superclass {superclass!r}: expected 1 to {most} sub-words for twin lock, the text "
            f"encoder {encoder_label(name)} reads {len(tokens)}; use a shorter everyday word"
        )
    embedding = encoder.transformer.get_input_embeddings()
    device = encoder.execution_device or embedding.weight.device
    rows = embedding(torch.tensor(tokens, device=device), out_dtype=torch.float32)
    return SuperclassWords(tuple(tokens), rows.detach().to("cpu", torch.float32, copy=True))
