"""Which size a training picture gets and which part of it is used; nothing is ever squashed."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

STEP = 64
"""Sides of resized pictures are multiples of this, where the resolution and the VAE allow it."""


@dataclass(frozen=True)
class Box:
    """A part of a picture in its pixels; it may reach beyond the picture's edges."""

    left: int
    top: int
    width: int
    height: int

    @property
    def right(self) -> int:
        """The first column to the right of the box."""
        return self.left + self.width

    @property
    def bottom(self) -> int:
        """The first row below the box."""
        return self.top + self.height


def fit(size: tuple[int, int], resolution: int, factor: int) -> tuple[Box, tuple[int, int]]:
    """The part of a picture of `size` (width, height) to use, and the size it is brought to.

    Resolution 0: the picture as it is, its edges cut to multiples of `factor`, the VAE's pixels
    per latent, where ComfyUI's VAE would cut them. Otherwise a size of about `resolution` squared
    pixels and of about the picture's aspect whose sides are multiples of `side_step`; what does
    not fit that aspect is cut off evenly on both sides.

    Raises:
        ValueError: when the picture or the resolution is smaller than one latent.
    """
    width, height = size
    if min(width, height) < factor:
        raise ValueError(
            f"expected a picture of at least {factor}x{factor}, the VAE's smallest, found "
            f"{width}x{height}"
        )
    if resolution == 0:
        target = width // factor * factor, height // factor * factor
        return Box((width % factor) // 2, (height % factor) // 2, *target), target
    if resolution < factor:
        raise ValueError(
            f"expected a resolution of 0 or at least {factor}, the VAE's pixels per latent, found "
            f"{resolution}"
        )
    target = _bucket(width, height, resolution, side_step(resolution, factor))
    return _centre(width, height, *target), target


def side_step(resolution: int, factor: int) -> int:
    """What the sides of a bucket are multiples of: 64, or else the VAE's pixels per latent."""
    return STEP if STEP % factor == 0 and resolution >= STEP else factor


def _bucket(width: int, height: int, resolution: int, step: int) -> tuple[int, int]:
    """The multiples of `step` near the exact sides that keep most of the picture and of the area.

    What is cut off is lost, what is made smaller only less sharp: the former counts twice.
    """
    stretch = math.sqrt(width / height)
    across, down = (_near(side, step) for side in (resolution * stretch, resolution / stretch))
    choices = list(itertools.product(across, down))
    within = [choice for choice in choices if math.prod(choice) <= resolution**2]
    if not within:
        # A very long picture whose short side cannot get any smaller.
        within = [min(choices, key=math.prod)]
    return max(within, key=lambda side: _kept(width, height, *side) ** 2 * math.prod(side))


def _near(side: float, step: int) -> list[int]:
    """Two multiples of `step` below a length and two above, none of them below `step`."""
    below = math.floor(side / step)
    return sorted({max(1, below + more) * step for more in (-1, 0, 1, 2)})


def _kept(width: int, height: int, across: int, down: int) -> float:
    """The share of the picture that an aspect keeps."""
    ratio = (across / down) / (width / height)
    return min(ratio, 1 / ratio)


def _centre(width: int, height: int, across: int, down: int) -> Box:
    """The largest box of an aspect in the middle of a picture, to the nearest pixel."""
    inner_width = min(width, max(1, round(height * across / down)))
    inner_height = min(height, max(1, round(width * down / across)))
    return Box((width - inner_width) // 2, (height - inner_height) // 2, inner_width, inner_height)
