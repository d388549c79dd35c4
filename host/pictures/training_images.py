"""Training pictures: checked, brought to size, encoded once, their masks on the latent grid."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from comfy.sd import VAE
from torch import Tensor

from ..models.loaded import pixels_per_latent
from .augment import render, subject_box, version_boxes
from .buckets import Box, fit
from .image_rows import size_of, training_rows

logger = logging.getLogger("perfusion")

# Enlarging by more than this, or cutting off more than this share, is worth a warning.
_MUCH_LARGER = 1.5
_MUCH_CUT = 0.25
# Of the model's own number of pixels; below it a picture is only a few cells of a latent.
_TINY = 0.25


@dataclass(frozen=True)
class ImageOptions:
    """How training pictures are brought to size and varied.

    Attributes:
        resolution: 0 brings pictures beyond the model's own size to that and leaves smaller ones
            as they are, up to edges cut off for the VAE's pixels per latent: enlarged, they would
            teach how blurred they are. Otherwise each gets about this number squared of pixels in
            its own aspect, with sides that are multiples of 64 (`buckets.fit`).
        flip: every version is also there mirrored, which doubles them. For things that look the
            same mirrored only: no writing, no asymmetric faces.
        crop: versions come closer; the largest share of each side that is cut off, 0 to 1.
        zoom_out: versions go further away; the largest share of each side that is background
            around the picture, 0 to 1. It is the picture's mirror image and is not learned.
        variants: how many versions, the first the picture itself; the others need `crop` or
            `zoom_out`.
        alpha: whether transparency is a mask, where no masks are given.
        seed: decides the versions.
    """

    resolution: int = 0
    flip: bool = False
    crop: float = 0.0
    zoom_out: float = 0.0
    variants: int = 1
    alpha: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resolution < 0:
            raise ValueError(
                f"resolution: expected 0 or a number of pixels, found {self.resolution}"
            )
        for name in ("crop", "zoom_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 to below 1, found {getattr(self, name)}")
        if self.variants < 1:
            raise ValueError(f"variants: expected at least 1, found {self.variants}")
        if (self.crop or self.zoom_out) and self.variants == 1:
            raise ValueError(
                f"variants: expected at least 2 with crop {self.crop} and zoom_out "
                f"{self.zoom_out}, found 1, which is the picture as it is; set variants to 4"
            )

    @property
    def closeness(self) -> int:
        """How many different parts of each picture there are, mirrored ones not counted."""
        return self.variants if self.crop or self.zoom_out else 1


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """Pictures as the model is trained on them.

    Attributes:
        latents: for each picture its versions (V, C, h, w) as the VAE makes them.
        masks: for each picture the weights (V, 1, h, w) of its versions, or None for no masks.
        sizes: for each picture (width, height) of its versions in pixels.
        digest: 16 hexadecimal digits of the pixels, masks and options all this was made from.
        lines: what was done to pictures of which size, for people.
    """

    latents: list[Tensor]
    masks: list[Tensor] | None
    sizes: list[tuple[int, int]]
    digest: str
    lines: tuple[str, ...] = ()


def encode_images(
    vae: VAE,
    images: Sequence[Tensor],
    masks: Sequence[Tensor] | None = None,
    options: ImageOptions | None = None,
    own_side: int = 0,
    before_each: Callable[[int, int], None] | None = None,
) -> TrainingImages:
    """Encode pictures (B, H, W, 3 or 4) in 0..1 of any sizes; each row is one picture.

    `masks` (B, H, W) or (H, W) in 0..1: one for each picture, or one for all. Without masks the
    fourth channel, if any picture is transparent somewhere, is a mask. Options default to
    pictures as they are.

    Args:
        vae: the VAE of the model.
        images: the pictures.
        masks: their masks.
        options: how they are brought to size and varied.
        own_side: pixels a side of the largest square picture that is left as it is without a
            resolution; 0 for no limit.
        before_each: called with a picture's number from 0 and their count before it is encoded.

    Raises:
        ValueError: for no pictures, NaN among them, pictures smaller than a latent; for masks of
            another number or size, with weights outside 0..1, or empty where they are used.
    """
    options = options or ImageOptions()
    pictures, weights = training_rows(images, masks, options.alpha)
    factor = pixels_per_latent(vae)
    fits = []
    for picture in pictures:
        size = size_of(picture)
        beyond = 0 < own_side**2 < size[0] * size[1]
        resolution = options.resolution or (own_side if beyond else 0)
        fits.append(fit(size, resolution, factor))
    counts = Counter((size_of(p), box, size) for p, (box, size) in zip(pictures, fits, strict=True))
    lines = _told(counts)
    if own_side and not options.resolution:
        _warn_of_tiny(counts, own_side)
    if weights is None and options.zoom_out:
        weights = [torch.ones_like(picture[..., 0]) for picture in pictures]
    versions = _versions(fits, weights, options)
    digest = _Digest(options)
    latents, grids = [], []
    with torch.no_grad():
        for at, (picture, (_, size)) in enumerate(zip(pictures, fits, strict=True)):
            if before_each is not None:
                before_each(at, len(pictures))
            digest.add("images", picture)
            mask = None if weights is None else weights[at]
            made = [render(picture, mask, box, size, flip) for box, flip in versions[at]]
            latents.append(_encoded(vae, torch.stack([pixels for pixels, _ in made]), at))
            if mask is not None:
                stack = torch.stack([mask for _, mask in made if mask is not None])[:, None]
                grids.append(
                    torch.nn.functional.interpolate(stack, latents[at].shape[-2:], mode="area")
                )
    for weight in weights or []:
        digest.add("masks", weight)
    return TrainingImages(
        latents=latents,
        masks=grids or None,
        sizes=[size for _, size in fits],
        digest=digest.text(),
        lines=lines,
    )


def _versions(
    fits: list[tuple[Box, tuple[int, int]]], weights: list[Tensor] | None, options: ImageOptions
) -> list[list[tuple[Box, bool]]]:
    """For each picture its parts, plain ones first, then the same mirrored."""
    generator = torch.Generator().manual_seed(options.seed)
    if options.variants > options.closeness:
        logger.info("without crop and zoom_out all versions of a picture are one; it is made once")
    versions = []
    for at, (box, _) in enumerate(fits):
        subject = None
        if weights is not None:
            if not _has_weight(weights[at], box):
                raise ValueError(
                    f"the mask of image {at} is empty within the part that is used, "
                    f"{box.width}x{box.height} from the middle; crop the image yourself"
                )
            subject = subject_box(weights[at], box)
        boxes = version_boxes(
            box, subject, options.closeness, options.crop, options.zoom_out, generator
        )
        if weights is not None:
            # A part between two masked places may hold neither.
            boxes = [part if _has_weight(weights[at], part) else box for part in boxes]
        flips = (False, True) if options.flip else (False,)
        versions.append([(part, flip) for flip in flips for part in boxes])
    return versions


def _has_weight(mask: Tensor, box: Box) -> bool:
    return bool(mask[max(0, box.top) : box.bottom, max(0, box.left) : box.right].any())


def _encoded(vae: VAE, pixels: Tensor, at: int) -> Tensor:
    if vae.latent_dim == 3:
        # To a VAE of videos they would be frames; one frame each, they are pictures.
        latents = torch.cat([vae.encode(picture[None]) for picture in pixels])[:, :, 0]
    else:
        latents = vae.encode(pixels)
    if latents.ndim != 4:
        raise ValueError(
            f"expected a VAE of pictures with latents (B, C, h, w), found {tuple(latents.shape)}; "
            "use the one that belongs to the model"
        )
    if not bool(torch.isfinite(latents).all()):
        raise ValueError(
            f"the VAE made NaN or infinity of image {at}; run it in another precision "
            "(--fp32-vae) or use another VAE"
        )
    return latents


def _told(counts: Counter[tuple[tuple[int, int], Box, tuple[int, int]]]) -> tuple[str, ...]:
    """What happens to pictures of each size, which is also logged."""
    lines = []
    for (source, box, target), count in counts.items():
        share = 1 - box.width * box.height / (source[0] * source[1])
        larger = target[0] / box.width
        done = []
        if share > 0:
            done.append(f"cropped to the middle {box.width}x{box.height} ({share:.1%} cut off)")
        if target != (box.width, box.height):
            done.append(f"resized to {target[0]}x{target[1]}")
        if larger > _MUCH_LARGER:
            done.append(f"which is {larger:.1f} times enlarged: larger pictures would be sharper")
        pictures = "1 picture" if count == 1 else f"{count} pictures"
        line = f"{pictures} of {source[0]}x{source[1]}: {', '.join(done) or 'as they are'}"
        lines.append(line)
        if done:
            level = logging.WARNING if larger > _MUCH_LARGER or share > _MUCH_CUT else logging.INFO
            logger.log(level, "%s", line)
    return tuple(lines)


def _warn_of_tiny(
    counts: Counter[tuple[tuple[int, int], Box, tuple[int, int]]], own_side: int
) -> None:
    """Say which pictures are so small that the model hardly knows pictures of that size."""
    tiny = {source for source, _, _ in counts if source[0] * source[1] < _TINY * own_side**2}
    if tiny:
        logger.warning(
            "pictures of %s are far below the %dx%d that the model was trained on and are learned "
            "as small as they are; use larger ones, or enlarge them with resolution %d in Training "
            "Options",
            *(", ".join(f"{width}x{height}" for width, height in sorted(tiny)), own_side),
            *(own_side, own_side),
        )


class _Digest:
    """Of pixels, masks and options, taken in one by one so that nobody waits for all at once."""

    def __init__(self, options: ImageOptions) -> None:
        self._content = hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode())

    def add(self, kind: str, tensor: Tensor) -> None:
        """Take in a picture or a mask; all pictures come before the masks."""
        self._content.update(f"{kind} {tuple(tensor.shape)}".encode())
        self._content.update(tensor.detach().cpu().contiguous().numpy().tobytes())

    def text(self) -> str:
        """16 hexadecimal digits."""
        return self._content.hexdigest()[:16]
