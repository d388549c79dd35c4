"""From maps of attention to masks of pictures.

Maps know a few dozen cells a side at most. A guided filter (He, Sun and Tang, 2010) brings them to
the edges of the picture, Otsu's threshold (1979) tells mask from rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from .attention import Grid

_BINS = 256
# Squared difference of colours, 0 to 1, from which on a guided filter sees an edge.
_EDGE = 1e-3
# How much more a word must be looked at within its mask than without, for it to be found at all.
_FLAT = 1.2
_TINT = (1.0, 0.16, 0.42)


@dataclass(frozen=True)
class MaskOptions:
    """How maps become masks.

    Attributes:
        threshold: where the mask begins, on the way from the place that is looked at least (0) to
            the one that is looked at most (1). 0: found for each picture, by Otsu's method.
        softness: how long that way takes from no mask to full mask; 0 makes hard edges.
        edges: whether masks follow the edges of the picture.
    """

    threshold: float = 0.0
    softness: float = 0.1
    edges: bool = True

    def __post_init__(self) -> None:
        for name in ("threshold", "softness"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, found {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class SoftMasks:
    """Masks (B, H, W) in 0..1, and what they rest on.

    ``contrasts`` (B,): how many times more the word is looked at within the mask than without.
    ``found`` (B,) bool: False where that is about the same; such a mask is 1 everywhere.
    """

    masks: Tensor
    contrasts: Tensor
    found: Tensor


def soft_masks(
    maps: Tensor, pictures: Tensor, work: Grid, radius: int, options: MaskOptions
) -> SoftMasks:
    """Masks of pictures (B, 3, H, W), 0 to 1, from maps (B, h, w) of shares.

    ``work``: height and width at which edges are looked for, about what the model saw;
    ``radius``: how far in these pixels an edge may be from where the maps have it.
    """
    size = pictures.shape[-2], pictures.shape[-1]
    level = _normalised(F.interpolate(maps[:, None], work, mode="bicubic", align_corners=False))
    if options.edges:
        level = follow_edges(level, pictures, radius)
    elif size != work:
        level = F.interpolate(level, size, mode="bilinear", align_corners=False)
    level = level[:, 0].clamp(0, 1)
    cut = torch.tensor([options.threshold or otsu(each) for each in level]).to(level)
    contrasts = torch.stack([_contrast(each) for each in maps]).cpu()
    found = contrasts >= _FLAT
    ramp = (level - cut[:, None, None]) / max(options.softness, 1e-6) + 0.5
    masks = torch.where(found.to(level.device)[:, None, None], ramp.clamp(0, 1), 1.0)
    return SoftMasks(masks, contrasts, found)


def otsu(values: Tensor) -> float:
    """The threshold that parts values best into two groups (Otsu, 1979): largest variance between.

    Values all alike are their own threshold.
    """
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return low
    counts = torch.histc(values.flatten().float().cpu(), _BINS, low, high).double()
    centers = low + (torch.arange(_BINS, dtype=torch.float64) + 0.5) / _BINS * (high - low)
    below, weighted = counts.cumsum(0), (counts * centers).cumsum(0)
    above = below[-1] - below
    means = weighted / below.clamp(min=1), (weighted[-1] - weighted) / above.clamp(min=1)
    best = int((below * above * (means[0] - means[1]).square()).argmax())
    return low + (best + 1) / _BINS * (high - low)


def follow_edges(maps: Tensor, pictures: Tensor, radius: int) -> Tensor:
    """Maps (B, 1, h, w) brought to the size of pictures (B, 3, H, W), along their edges.

    A guided filter: within every window of ``radius`` cells of the maps the result is the affine
    function of the colours that fits the map best. The functions are found at the maps' size and
    used at the pictures'.
    """
    work = maps.shape[-2], maps.shape[-1]
    guide = F.interpolate(pictures, work, mode="area")
    mean_guide, mean_map = _window_mean(guide, radius), _window_mean(maps, radius)
    covariance = _window_mean(guide * maps, radius) - mean_guide * mean_map  # B 3 h w
    products = rearrange(einsum(guide, guide, "b c h w, b d h w -> b c d h w"),
                         "b c d h w -> b (c d) h w")  # fmt: skip
    guide_covariance = rearrange(_window_mean(products, radius), "b (c d) h w -> b h w c d", c=3)
    guide_covariance = guide_covariance - einsum(
        mean_guide, mean_guide, "b c h w, b d h w -> b h w c d"
    )
    guide_covariance = guide_covariance + _EDGE * torch.eye(3, device=maps.device)
    slopes = torch.linalg.solve(guide_covariance, rearrange(covariance, "b c h w -> b h w c"))
    slopes = rearrange(slopes, "b h w c -> b c h w")
    offset = mean_map - (slopes * mean_guide).sum(1, keepdim=True)
    functions = _window_mean(torch.cat([slopes, offset], 1), radius)
    functions = F.interpolate(functions, pictures.shape[-2:], mode="bilinear", align_corners=False)
    return (functions[:, :3] * pictures).sum(1, keepdim=True) + functions[:, 3:]


def _window_mean(values: Tensor, radius: int) -> Tensor:
    side = 2 * radius + 1
    padded = F.pad(values, (radius,) * 4, mode="replicate")
    return F.avg_pool2d(F.avg_pool2d(padded, (side, 1), 1), (1, side), 1)


def _normalised(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


def _contrast(map_: Tensor) -> Tensor:
    """How many times more is looked at the better part of a map (h, w) than at the rest."""
    inside = map_ > otsu(map_)
    if not bool(inside.any()):
        return map_.new_ones(())
    return map_[inside].mean() / map_[~inside].mean().clamp(min=torch.finfo(map_.dtype).tiny)


def iou(masks: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union (B,) of masks (B, H, W) cut at one half; 1 for two empty ones."""
    first, second = (each.flatten(1) > 0.5 for each in (masks, truth))
    both, either = (first & second).sum(1), (first | second).sum(1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def overlay(pictures: Tensor, masks: Tensor) -> Tensor:
    """Pictures (B, H, W, 3) with masks (B, H, W) in colour, outlined, and the rest dimmed."""
    inside = masks[..., None]
    tint = torch.tensor(_TINT, device=pictures.device, dtype=pictures.dtype)
    grey = pictures.mean(-1, keepdim=True)
    rest = 0.5 * (0.5 * pictures + 0.5 * grey)
    shown = torch.lerp(rest, torch.lerp(pictures, tint, 0.22), inside)
    line = _outline(masks, max(1, round(min(masks.shape[1:]) / 250)))[..., None]
    return torch.lerp(shown, tint, 0.9 * line).clamp(0, 1)


def _outline(masks: Tensor, width: int) -> Tensor:
    """1 on the inner edge of masks (B, H, W) cut at one half, ``width`` pixels wide."""
    hard = (masks > 0.5).float()[:, None]
    # The picture's own border is no edge.
    outside = F.pad(1 - hard, (width,) * 4, mode="replicate")
    side = 2 * width + 1
    near = F.max_pool2d(F.max_pool2d(outside, (side, 1), 1), (1, side), 1)
    return (hard * near)[:, 0]
