"""Reduction of the error maps to one loss for each image (method section 3)."""

from __future__ import annotations

from typing import Literal

from einops import rearrange, reduce
from torch import Tensor

Normalisation = Literal["subject", "picture"]


def image_losses(
    errors: Tensor,
    masks: Tensor | None,
    background: float = 0.0,
    normalisation: Normalisation = "subject",
) -> Tensor:
    """Mean (B,) of each image's ``errors`` (B, C, h, w) over the pixels that matter.

    The weight of a pixel is its mask (B, 1, h, w) over the image's largest, once and not squared,
    and at least ``background``. "subject" divides by the sum of an image's weights, so that a
    small subject counts as much as a large one; "picture" by the number of pixels, so that it
    counts by its size. Without masks both are the plain mean.

    Raises:
        ValueError: when the shapes differ.
    """
    if errors.ndim != 4:
        raise ValueError(f"expected errors (B, C, h, w), found {tuple(errors.shape)}")
    pixels = reduce(errors.float(), "b c h w -> b h w", "mean")
    if masks is None:
        return reduce(pixels, "b h w -> b", "mean")
    batch, height, width = pixels.shape
    if masks.shape != (batch, 1, height, width):
        raise ValueError(
            f"expected masks {(batch, 1, height, width)} like the errors, "
            f"found {tuple(masks.shape)}"
        )
    weights = rearrange(masks.to(pixels), "b 1 h w -> b h w")
    largest = reduce(weights, "b h w -> b 1 1", "max")
    weights = (weights / largest).clamp(min=background)
    weighted = reduce(pixels * weights, "b h w -> b", "sum")
    total = reduce(weights, "b h w -> b", "sum") if normalisation == "subject" else height * width
    return weighted / total


def masked_mean(errors: Tensor, masks: Tensor | None, background: float = 0.0) -> Tensor:
    """`image_losses` with equal subjects, averaged over the images: a scalar."""
    return image_losses(errors, masks, background).mean()
