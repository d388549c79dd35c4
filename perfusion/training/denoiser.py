"""What training needs of a text-to-image model. `host` implements it; the method only sees this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..gated.rank_one import GatedProjections, Part
from ..gated.twin_lock import TwinProjections

Projections = GatedProjections | TwinProjections


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Prompts as the model is conditioned on them.

    Attributes:
        encodings: (B, N, D).
        mask: (B, N) bool, best on the CPU; True at the tokens of the concept (or of the superclass
            word standing in its place).
        extra: (B, ...) the denoiser's own (pooled outputs), only ever handed back to it.
    """

    encodings: Tensor
    mask: Tensor
    extra: Tensor | None = None

    def rows(self, chosen: Tensor) -> Conditioning:
        """Some of the prompts, by their int64 indices (n,); one may be chosen many times."""
        extra = None if self.extra is None else stacked_rows(self.extra, chosen)
        return Conditioning(
            stacked_rows(self.encodings, chosen), stacked_rows(self.mask, chosen), extra
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """The random choices of one step, made with the trainer's own generator.

    Attributes:
        indices: (B,) int64, training images.
        variants: (B,) int64, their augmented versions.
        timesteps: (B,) float32 in [0, 1), to be mapped onto the model's own schedule.
        seeds: (B,) int64; the noise of a row comes from a CPU generator of its own with that seed,
            so it does not depend on which rows are computed together.
    """

    indices: Tensor
    variants: Tensor
    timesteps: Tensor
    seeds: Tensor

    def rows(self, chosen: Tensor) -> Batch:
        """Some of the rows, by their int64 indices (n,)."""
        every = self.indices, self.variants, self.timesteps, self.seeds
        return Batch(*(tensor[chosen] for tensor in every))

    def noise(self, *shape: int) -> Tensor:
        """The rows' standard normal noise (B, *shape), float32 on the CPU."""
        generators = (torch.Generator().manual_seed(seed) for seed in self.seeds.tolist())
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def stacked_rows(tensor: Tensor, chosen: Tensor) -> Tensor:
    """``tensor[chosen]`` for int64 indices (n,), with gradients that are the same every time.

    The gradient of plain indexing is a scatter: where a row is chosen more than once, several
    threads add into it in whatever order they arrive, and sums of floats depend on their order.
    Here autograd adds them one after the other.
    """
    rows = tensor.unbind(0)
    return torch.stack([rows[at] for at in chosen.tolist()])


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

    @property
    def variant_count(self) -> int:
        """How many augmented versions there are of each image, at least 1."""
        ...

    @property
    def data_hash(self) -> str:
        """Identifies the model's weights, the images, their masks and their augmentation."""
        ...

    @property
    def needs_scaling(self) -> bool:
        """Whether gradients are computed in fp16, where those of a plain loss would vanish."""
        ...

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width of an image on the latent grid, the same for all its variants."""
        ...

    def initial_embeddings(self) -> dict[str, Tensor]:
        """Text encoder -> token vector (dim,) of the superclass (mean over its sub-words)."""
        ...

    def encode(self, prompts: Sequence[str], embeddings: Mapping[str, Tensor]) -> Conditioning:
        """Encode prompts that each contain the placeholder once, with these token vectors.

        Differentiable with respect to ``embeddings``.

        Raises:
            ValueError: naming a prompt without the placeholder.
        """
        ...

    def encode_superclass(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts that each contain the superclass once, the mask on all its sub-words.

        Raises:
            ValueError: naming a prompt without the superclass.
        """
        ...

    def random_embeddings(self) -> dict[str, Tensor]:
        """Text encoder -> a random vector (dim,) that names the concept.

        It has the superclass's norm and is the same for every run of one placeholder.
        """
        ...

    def encode_twins(
        self, prompts: Sequence[str], embeddings: Mapping[str, Tensor]
    ) -> tuple[Conditioning, Conditioning]:
        """Encode prompts that each contain the placeholder once, twice each.

        Returns:
            The prompts with the superclass's last sub-word replaced by these vectors, and their
            twins with the superclass as it is; token for token of one length, both masks on that
            one token of every prompt.

        Raises:
            ValueError: naming a prompt without the placeholder.
        """
        ...

    def release_text(self) -> None:
        """Make room: no text will be encoded for training any more."""
        ...

    def token_rms(self, encoder: str) -> float:
        """The root mean square of a text encoder's token table."""
        ...

    def project(self, layer: str, part: Part, encodings: Tensor) -> Tensor:
        """Unedited key or value projection (B, N, D) -> (B, N, d) by the layer's own forward."""
        ...

    def errors(self, batch: Batch, encoded: Conditioning, edit: Projections | None) -> Tensor:
        """Squared error (B, C, h, w) of the model's prediction, times its native loss weight.

        Noises the images of ``batch``, all of one shape, and predicts with ``encoded`` as the
        condition; with an ``edit``, every text projection of every layer is
        ``edit.apply(own_forward, layer, part)`` instead of its own forward.
        """
        ...

    def masks(self, batch: Batch) -> Tensor | None:
        """Weights (B, 1, h, w) of the pixels of these images, or None for no masks.

        The images are of one shape. Either all images have masks or none.
        """
        ...
