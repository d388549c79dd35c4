"""What comes in as training pictures and masks, checked and one by one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..interface.messages import warn

logger = logging.getLogger("perfusion")

# What rounding may do to weights that should lie in 0..1.
_SLACK = 1e-3
# What Load Image gives for a picture without transparency.
_STAND_IN = (64, 64)


def training_rows(
    images: Sequence[Tensor], masks: Sequence[Tensor] | None, alpha: bool
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Checked pictures (H, W, 3) and masks (H, W) in 0..1, one by one.

    Without masks the fourth channel is one for all when `alpha` and a picture is transparent
    somewhere. Load Image gives an empty mask of 64 x 64 for a picture without transparency, which
    is none; among others it counts everywhere.

    Raises:
        ValueError: for no pictures, NaN, masks of another number or size, outside 0..1 or empty.
    """
    check_images(images)
    rows = [row.float() for batch in images for row in batch]
    pictures = [row[..., :3] for row in rows]
    given = None if masks is None else _given([mask.float() for mask in masks], pictures)
    if given is not None:
        device = pictures[0].device
        weights = _matched([mask.to(device) for mask in given], pictures)
        _warn_of_transparency(weights)
    elif alpha and any(row.shape[-1] == 4 and bool((row[..., 3] < 1).any()) for row in rows):
        # Pictures without a fourth channel among those with one are opaque.
        weights = [(row if row.shape[-1] == 4 else torch.ones_like(row))[..., -1] for row in rows]
        logger.info("the transparency of the pictures is their mask")
    else:
        return pictures, None
    for at, weight in enumerate(weights):
        _check_mask(weight, at)
    return pictures, [weight.clamp(0, 1) for weight in weights]


def check_images(images: Sequence[Tensor]) -> None:
    """Raise ValueError unless these are pictures: (B, H, W, 3 or 4), finite, at least one."""
    count = 0
    for batch in images:
        if batch.ndim != 4 or batch.shape[-1] not in (3, 4):
            raise ValueError(
                f"expected images (B, H, W, 3 or 4), found {tuple(batch.shape)}; connect an IMAGE "
                "output"
            )
        if 0 in batch.shape[1:]:
            raise ValueError(f"expected images with pixels, found {tuple(batch.shape)}")
        for at, image in enumerate(batch):
            if not bool(torch.isfinite(image).all()):
                raise ValueError(
                    f"expected finite images, found NaN or infinity in image {count + at}"
                )
        count += batch.shape[0]
    if count == 0:
        raise ValueError(
            "expected at least one training image, found none; connect 4 to 6 pictures of the thing"
        )


def _given(masks: list[Tensor], pictures: list[Tensor]) -> list[Tensor] | None:
    """The masks without Load Image's stand-ins; None when there are no others."""
    if any(mask.ndim not in (2, 3) for mask in masks):
        return masks  # refused later, by its shape
    rows = [row for mask in masks for row in (mask[None] if mask.ndim == 2 else mask)]
    standing_in = [row.shape == _STAND_IN and not bool(row.any()) for row in rows]
    if not rows or not any(standing_in):
        return masks
    if all(standing_in):
        return None
    if len(rows) != len(pictures):
        return masks
    return [
        torch.ones_like(picture[..., 0]) if stands_in else row
        for row, stands_in, picture in zip(rows, standing_in, pictures, strict=True)
    ]


def _warn_of_transparency(weights: list[Tensor]) -> None:
    """Say which masks look like Load Image's: white where the picture is transparent."""
    turned = [str(at) for at, mask in enumerate(weights) if _is_around_something(mask)]
    if turned:
        warn(
            f"the mask of image {', '.join(turned)} covers its edges and leaves out something "
            "within, as that of Load Image does, which is white where a picture is transparent; if "
            "the thing is what is left out, put Invert Mask between"
        )


def _is_around_something(mask: Tensor) -> bool:
    """Whether a mask (H, W) has all edges and a hole, or most of the edges and not the middle."""
    height, width = mask.shape
    if min(height, width) <= 2:
        return False
    edge, hole = _edge(mask) >= 0.5, mask < 0.5
    middle = hole[height // 3 : height - height // 3, width // 3 : width - width // 3]
    closed = bool(edge.all()) and bool(hole.any())
    return closed or (float(edge.float().mean()) > 0.7 and float(middle.float().mean()) > 0.5)


def _edge(mask: Tensor) -> Tensor:
    """The outermost pixels of a mask (H, W), in one row."""
    return torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])


def _matched(masks: list[Tensor], pictures: list[Tensor]) -> list[Tensor]:
    rows: list[Tensor] = []
    for mask in masks:
        if mask.ndim not in (2, 3):
            raise ValueError(f"expected masks (B, H, W), found {tuple(mask.shape)}")
        rows.extend(mask[None] if mask.ndim == 2 else mask)
    if len(rows) not in (1, len(pictures)):
        raise ValueError(
            f"expected a mask for each of the {len(pictures)} images, or one for all, found "
            f"{len(rows)}; make the masks from the same pictures"
        )
    if len(rows) == 1:
        rows = rows * len(pictures)
    for at, (mask, picture) in enumerate(zip(rows, pictures, strict=True)):
        if mask.shape != picture.shape[:2]:
            wanted, found = size_of(picture), size_of(mask)
            raise ValueError(
                f"expected a mask of {wanted[0]}x{wanted[1]} for image {at}, found "
                f"{found[0]}x{found[1]}; make the mask from the same picture"
            )
    return rows


def _check_mask(mask: Tensor, at: int) -> None:
    if not bool(torch.isfinite(mask).all()):
        raise ValueError(f"expected a finite mask, found NaN or infinity in that of image {at}")
    low, high = float(mask.min()), float(mask.max())
    if low < -_SLACK or high > 1 + _SLACK:
        raise ValueError(
            f"expected mask weights in 0..1, found {low:.3g} to {high:.3g} in that of image {at}"
        )
    if high <= 0:
        raise ValueError(
            f"the mask of image {at} is empty, so nothing of it would be learned; paint where the "
            "thing is, or leave the image out"
        )


def size_of(picture: Tensor) -> tuple[int, int]:
    """(width, height) of a picture (H, W, C) or a mask (H, W)."""
    return picture.shape[1], picture.shape[0]
