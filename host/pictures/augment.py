"""Versions of a training picture: closer, further away and mirrored, its mask always with it."""

from __future__ import annotations

import torch
from torch import Tensor

from .buckets import Box


def version_boxes(
    box: Box,
    subject: Box | None,
    count: int,
    crop: float,
    zoom_out: float,
    generator: torch.Generator,
) -> list[Box]:
    """`count` parts of a picture: first `box` itself, then closer and wider ones at random.

    Up to the share `crop` of each side is cut off, or up to the share `zoom_out` of each side of
    the result is background around `box`. A closer part holds all of `subject`, a box within
    `box`, or as much of it as it has room for.
    """
    boxes = [box]
    draws = torch.rand(count - 1, 3, generator=generator, dtype=torch.float64)
    for zoom, across, down in draws.tolist():
        cut = zoom * (crop + zoom_out) - zoom_out
        scale = 1 - cut if cut >= 0 else 1 / (1 + cut)
        width, height = (max(1, round(side * scale)) for side in (box.width, box.height))
        held = subject or box
        left = _place(box.left, box.right, width, held.left, held.right, across)
        top = _place(box.top, box.bottom, height, held.top, held.bottom, down)
        boxes.append(Box(left, top, width, height))
    return boxes


def _place(start: int, end: int, size: int, first: int, last: int, position: float) -> int:
    """Where a stretch of `size` begins, `position` (0 to 1) of the way it can go.

    Shorter than `start` to `end` it stays inside and holds `first` to `last` if it can; longer it
    holds all of it.
    """
    low, high = sorted((start, end - size))
    nearest, furthest = sorted((first, last - size))
    low, high = max(low, nearest), min(high, furthest)
    return low + round(position * (high - low))


def subject_box(mask: Tensor, box: Box) -> Box:
    """Where in `box` a mask (H, W) is above half its largest weight there, which must be > 0."""
    inside = mask[box.top : box.bottom, box.left : box.right]
    strong = inside > 0.5 * inside.max()
    rows, columns = strong.any(1).nonzero().flatten(), strong.any(0).nonzero().flatten()
    left, top = box.left + int(columns[0]), box.top + int(rows[0])
    return Box(left, top, int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1)


def render(
    picture: Tensor, mask: Tensor | None, box: Box, size: tuple[int, int], flip: bool
) -> tuple[Tensor, Tensor | None]:
    """A part of a picture (H, W, 3) and of its mask (H, W), at `size` (width, height).

    Beyond the edges the picture goes on as its mirror image, and the mask is 0, so that what is
    there is not learned. A part that has the size already is taken bit for bit.

    Raises:
        ValueError: for a part beyond the edges without a mask to say so.
    """
    height, width = picture.shape[:2]
    rows = torch.arange(box.top, box.bottom, device=picture.device)
    columns = torch.arange(box.left, box.right, device=picture.device)
    part = picture[_mirrored(rows, height)][:, _mirrored(columns, width)]
    beyond = _beyond(rows, height)[:, None] | _beyond(columns, width)
    if mask is None:
        if bool(beyond.any()):
            raise ValueError(f"expected a mask for {box}, which reaches beyond the picture")
        weights = None
    else:
        weights = mask[_mirrored(rows, height)][:, _mirrored(columns, width)]
        weights = weights.masked_fill(beyond, 0.0)
    if (box.width, box.height) != size:
        part = _resized(part.movedim(-1, 0), size, "bicubic").movedim(0, -1)
        # Not bicubic: its ringing would give weight to what has none.
        weights = None if weights is None else _resized(weights[None], size, "bilinear")[0]
    if flip:
        part = part.flip(1)
        weights = None if weights is None else weights.flip(1)
    return part, weights


def _resized(part: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(C, H, W) to (C, h, w) in 0..1, every pixel of the source counted where it is made small."""
    made = torch.nn.functional.interpolate(part[None], size[::-1], mode=mode, antialias=True)[0]
    return made.clamp(0, 1)


def _beyond(places: Tensor, length: int) -> Tensor:
    return (places < 0) | (places >= length)


def _mirrored(places: Tensor, length: int) -> Tensor:
    """Places on an endless line of mirror images, as places in the one picture."""
    turn = places % (2 * length)
    return torch.where(turn < length, turn, 2 * length - 1 - turn)
