"""What has to be true before a run makes its first step."""

from __future__ import annotations

import torch

from ..gated.covariance import Covariance
from .config import TrainingConfig
from .denoiser import Batch, Denoiser


def check_inputs(denoiser: Denoiser, config: TrainingConfig, covariance: Covariance) -> None:
    """Make sure that a run can be made of these.

    Raises:
        ValueError: without images or layers, with captions of another number, with a covariance of
            another text encoder, and for a mask without weight.
    """
    if denoiser.image_count < 1:
        raise ValueError("expected at least one training image, found none")
    if config.captions and len(config.captions) != denoiser.image_count:
        raise ValueError(
            f"expected a caption for each of the {denoiser.image_count} images, found "
            f"{len(config.captions)} captions; give as many, or none for the built-in sentences"
        )
    if not denoiser.layers:
        raise ValueError(
            f"expected cross-attention layers over text in the {denoiser.family} model, found none"
        )
    if covariance.encoder_hash != denoiser.encoder_hash:
        raise ValueError(
            f"expected a covariance of this model's text encoder ({denoiser.encoder_hash}), found "
            f"one of {covariance.encoder_hash}; measure it again with this model"
        )
    for index in range(denoiser.image_count):
        for variant in range(denoiser.variant_count):
            _check_mask(denoiser, index, variant)


def _check_mask(denoiser: Denoiser, index: int, variant: int) -> None:
    one = torch.tensor([index]), torch.tensor([variant])
    mask = denoiser.masks(Batch(*one, torch.zeros(1), torch.zeros(1, dtype=torch.int64)))
    if mask is None:
        return
    if not (bool(torch.isfinite(mask).all()) and float(mask.min()) >= 0 < float(mask.max())):
        raise ValueError(
            f"expected a mask of finite weights from 0 with some above it for image {index}, "
            f"found {float(mask.min())} to {float(mask.max())}"
        )
