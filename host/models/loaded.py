"""What a checkpoint's loader hands out, kept together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE


@dataclass(frozen=True, eq=False)
class Models:
    """A MODEL with the CLIP and the VAE that belong to it."""

    model: ModelPatcher
    clip: CLIP
    vae: VAE


def pixels_per_latent(vae: VAE) -> int:
    """How many pixels a side of a picture become one cell of its latent."""
    # Of a VAE of videos it would be three functions and numbers.
    factor: Any = vae.spacial_compression_encode()
    return factor
