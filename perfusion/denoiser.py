"""What training needs of a text-to-image model. `host` implements it; the method only sees this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .rank_one import GatedEdit, Part


@dataclass(frozen=True, eq=False)
class Encoded:
    """Prompts as the model is conditioned on them.

    ``encodings`` (B, N, D); ``mask`` (B, N) bool is True at the tokens of the concept (or of the
    superclass word standing in its place). ``extra`` is the denoiser's own (pooled outputs and
    the like) and only ever handed back to it.
    """

    encodings: Tensor
    mask: Tensor
    extra: Any = None


@dataclass(frozen=True, eq=False)
class Batch:
    """The random choices of one step, made with the trainer's own generator.

    ``indices`` (B,) int64 name training images, ``timesteps`` (B,) float32 lie in [0, 1) and are
    to be mapped onto the model's own schedule. ``generator`` (on the CPU) draws the noise, and
    nothing else may draw from it.
    """

    indices: Tensor
    timesteps: Tensor
    generator: torch.Generator


class Denoiser(Protocol):
    """A frozen model with its training images.

    Nothing here may change the model's weights. Everything differentiable is so only with respect
    to the embeddings and the edit's outputs.
    """

    @property
    def family(self) -> str:
        """Model family, e.g. "sd1"; goes into the concept."""
        ...

    @property
    def encoder_hash(self) -> str:
        """Identifies the text encoder, its layer and its concatenation."""
        ...

    @property
    def layers(self) -> Mapping[str, int]:
        """Module path of every cross-attention over text -> d, the width of its keys and values."""
        ...

    @property
    def image_count(self) -> int:
        """How many training images there are."""
        ...

    def initial_embeddings(self) -> dict[str, Tensor]:
        """Text encoder -> token vector (dim,) of the superclass (mean over its sub-words)."""
        ...

    def encode(self, prompts: Sequence[str], embeddings: Mapping[str, Tensor]) -> Encoded:
        """Encode prompts that each contain the placeholder once, with these token vectors.

        Differentiable with respect to ``embeddings``. Raises ValueError, naming the prompt, when
        the placeholder is missing from it.
        """
        ...

    def encode_superclass(self, prompts: Sequence[str]) -> Encoded:
        """Encode prompts that each contain the superclass once, the mask on all its sub-words.

        Raises ValueError, naming the prompt, when the superclass is missing from it.
        """
        ...

    def project(self, layer: str, part: Part, encodings: Tensor) -> Tensor:
        """Unedited key or value projection (B, N, D) -> (B, N, d) by the layer's own forward."""
        ...

    def errors(self, batch: Batch, encoded: Encoded, edit: GatedEdit | None) -> Tensor:
        """Squared error (B, C, h, w) of the model's prediction, times its native loss weight.

        Noises the images of ``batch`` and predicts with ``encoded`` as the condition; with an
        ``edit``, every text projection of every layer is ``edit.apply(own_forward, layer, part)``
        instead of its own forward.
        """
        ...

    def masks(self, indices: Tensor) -> Tensor | None:
        """Weights (B, 1, h, w) of the pixels of these images, or None for no masks."""
        ...
