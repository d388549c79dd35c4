"""Training pictures: checked, encoded once, their masks on the latent grid."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """For each image its variants' latents (V, C, h, w) as the VAE makes them, their masks
    (V, 1, h, w) or None for no masks, and its (width, height) in pixels.

    ``digest`` names pictures, masks and how they were changed.
    """

    latents: list[Tensor]
    masks: list[Tensor] | None
    sizes: list[tuple[int, int]]
    digest: str


def encode_images(vae: Any, images: Tensor, mask: Tensor | None) -> TrainingImages:
    """Encode pictures (B, H, W, 3) in 0..1 and bring their mask to the latent grid.

    Raises:
        ValueError: for no pictures, NaN among them, a mask of another number or size.
    """
    check_images(images)
    masks = None if mask is None else _checked_mask(mask, images)
    with torch.no_grad():
        pixels = images[..., :3]
        latents = vae.encode(pixels)
        if not bool(torch.isfinite(latents).all()):
            raise ValueError(
                "the VAE made NaN or infinity of the images; run it in another precision "
                "(--fp32-vae) or use another VAE"
            )
        cropped = vae.vae_encode_crop_pixels(pixels)
        if masks is not None:
            # Three equal channels, so that the mask is cropped exactly as a picture is.
            picture = masks[..., None].expand(-1, -1, -1, pixels.shape[-1])
            edges = vae.vae_encode_crop_pixels(picture)[..., :1].movedim(-1, 1)
            masks = torch.nn.functional.interpolate(edges, latents.shape[-2:], mode="area")
    content = hashlib.sha256(pixels.float().cpu().contiguous().numpy().tobytes())
    if masks is not None:
        content.update(masks.float().cpu().contiguous().numpy().tobytes())
    return TrainingImages(
        list(latents[:, None]),
        None if masks is None else list(masks[:, None]),
        [(cropped.shape[2], cropped.shape[1])] * len(latents),
        content.hexdigest()[:16],
    )


def check_images(images: Tensor) -> None:
    """Raise ValueError unless these are pictures: (B, H, W, 3 or 4), finite, at least one."""
    if images.ndim != 4 or images.shape[-1] not in (3, 4):
        raise ValueError(
            f"expected images (B, H, W, 3), found {tuple(images.shape)}; connect an IMAGE output"
        )
    if 0 in images.shape:
        raise ValueError(
            f"expected at least one training image, found {tuple(images.shape)}; connect 4 to 6 "
            "pictures of the thing"
        )
    if not bool(torch.isfinite(images).all()):
        bad = [at for at, image in enumerate(images) if not bool(torch.isfinite(image).all())]
        raise ValueError(f"expected finite images, found NaN or infinity in image {bad[0]}")


def _checked_mask(mask: Tensor, images: Tensor) -> Tensor:
    masks = mask.float()
    masks = masks[None] if masks.ndim == 2 else masks
    count, height, width = images.shape[:3]
    if masks.ndim != 3 or masks.shape[1:] != (height, width) or masks.shape[0] not in (1, count):
        raise ValueError(
            f"expected a mask for each of the {count} images of {width}x{height}, found "
            f"{tuple(masks.shape)}; make the mask from the same pictures"
        )
    return masks.expand(count, -1, -1)
