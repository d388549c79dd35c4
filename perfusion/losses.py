"""Reduction of the error maps to one loss (method section 3)."""

from __future__ import annotations

from einops import rearrange, reduce
from torch import Tensor


def masked_mean(errors: Tensor, masks: Tensor | None, background: float = 0.0) -> Tensor:
    """Mean of ``errors`` (B, C, h, w) over the pixels that matter, as a scalar.

    The weight of a pixel is its mask (B, 1, h, w) over the image's largest, once and not squared,
    and at least ``background``. Each image is normalised by the sum of its weights, so that a
    small subject counts as much as a large one; images are then averaged. Without masks this is
    the plain mean. Raises ValueError when the shapes differ.
    """
    if errors.ndim != 4:
        raise ValueError(f"expected errors (B, C, h, w), found {tuple(errors.shape)}")
    pixels = reduce(errors.float(), "b c h w -> b h w", "mean")
    if masks is None:
        return pixels.mean()
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
    return (weighted / reduce(weights, "b h w -> b", "sum")).mean()
