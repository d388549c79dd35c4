"""The small picture a concept file may carry: made of an IMAGE, read from a stranger's file."""

from __future__ import annotations

import base64
import binascii
from io import BytesIO
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from ...perfusion.concept.concept import Concept
from ...perfusion.concept.metadata import THUMBNAIL

# What a thumbnail may add to a file, in characters.
URL_LIMIT = 6 * 1024
# Pixels a side and JPEG quality, tried in this order. Even noise fits with the last.
ATTEMPTS = (
    *((256, 80), (256, 65), (192, 80), (192, 65), (160, 75), (160, 60)),
    *((128, 75), (128, 60), (128, 40), (128, 20), (128, 10)),
)
# Of a file's picture: neither many kinds of decoders nor large pictures are for strangers.
FORMATS = ("JPEG", "PNG", "WEBP")
LARGEST_SIDE = 1024
# What Pillow raises for damaged pictures.
UNREADABLE = (ValueError, OSError, SyntaxError, EOFError, Image.DecompressionBombError)
_START = "data:image/jpeg;base64,"


def thumbnail_url(images: Tensor) -> str:
    """The middle square of the first of the images (B, H, W, C) as a data:image/jpeg URL.

    The first of `ATTEMPTS` within `URL_LIMIT` characters. The same picture gives the same text.

    Raises:
        ValueError: for no image, and for NaN in it.
    """
    if images.ndim != 4 or 0 in images.shape or images.shape[-1] < 3:
        raise ValueError(
            f"expected an image (1, H, W, 3) for the thumbnail, found {tuple(images.shape)}"
        )
    first = images[:1, ..., :3].float().cpu().movedim(-1, 1)
    if not bool(torch.isfinite(first).all()):
        raise ValueError("expected a finite image for the thumbnail, found NaN or infinity")
    height, width = first.shape[-2:]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    middle = first[..., top : top + short, left : left + short]
    url = ""
    for side, quality in ATTEMPTS:
        square = torch.nn.functional.interpolate(middle, (side, side), mode="area")
        pixels = (square[0].movedim(0, -1).clamp(0, 1) * 255).round().to(torch.uint8)
        file = BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=quality, optimize=True)
        url = _START + base64.b64encode(file.getvalue()).decode()
        if len(url) <= URL_LIMIT:
            break
    return url


def thumbnail_of(concept: Concept) -> tuple[Tensor, str]:
    """A concept's picture (1, H, W, 3) in 0..1, and a line about it.

    Where there is none, or none that can be read, the picture is a plain grey one and the line
    says so. Nothing in the file is trusted.
    """
    url = concept.metadata.get(THUMBNAIL)
    if url is None:
        return _plain(), "none in the file; a plain grey picture stands in for it"
    try:
        picture, kind = _decode(url)
    except UNREADABLE as error:
        return _plain(), f"cannot be read ({type(error).__name__}); a plain grey picture instead"
    height, width = picture.shape[1:3]
    return picture, f"{kind}, {width} x {height}, {len(url) / 1000:.1f} kB of the file"


def _decode(url: str) -> tuple[Tensor, str]:
    _, _, text = url.partition(";base64,")
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("expected base64 after ;base64,") from error
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        # The size is known from the first bytes, before anything is unpacked.
        if max(image.size) > LARGEST_SIDE:
            raise ValueError(f"expected at most {LARGEST_SIDE} pixels a side, found {image.size}")
        pixels: Any = numpy.asarray(image.convert("RGB"))
        return torch.from_numpy(pixels.copy())[None].float() / 255, str(image.format)


def _plain() -> Tensor:
    return torch.full((1, 128, 128, 3), 0.5)
