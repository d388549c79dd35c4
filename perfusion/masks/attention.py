"""Where a model looks at a word: maps made of its attention.

Cross-attention tells for every cell of a picture how much of its attention a word gets (DAAM,
Tang et al., arXiv 2210.04885). Self-attention tells which cells are alike, and hands what one of
them saw on to the others (DiffSegmenter, Wang et al., arXiv 2309.02773).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of a layer's cells."""

# Queries whose attention to all keys is held at once.
_CHUNK = 1024


def word_share(queries: Tensor, keys: Tensor, word: Tensor) -> Tensor:
    """Share (B, P) of attention that a word's tokens get from each cell, the mean over heads.

    ``queries`` (B, H, P, d) of cells, ``keys`` (B, H, N, d) of tokens, ``word`` (N,) bool, or
    the numbers (n,) of those tokens, which a device can look up without being waited for. The
    start token takes the rest: against the other words alone, cells that look at no word at all
    would count as much as those that do.
    """
    total = torch.zeros(queries.shape[0], queries.shape[2], device=queries.device)
    chosen = (word.nonzero().flatten() if word.dtype == torch.bool else word).to(queries.device)
    for q, k in zip(queries.unbind(1), keys.unbind(1), strict=True):
        total += _attention(q, k).index_select(-1, chosen).sum(-1)
    return total / queries.shape[1]


def affinity(queries: Tensor, keys: Tensor) -> Tensor:
    """Self-attention (P, P) of P cells, the mean over rows and heads; its rows sum to 1.

    ``queries`` and ``keys`` (B, H, P, d). Never holds more than P x P and a few rows of it.
    """
    rows, heads, cells, _ = queries.shape
    total = torch.zeros(cells, cells, device=queries.device)
    for q, k in zip(queries.flatten(0, 1), keys.flatten(0, 1), strict=True):
        for start in range(0, cells, _CHUNK):
            total[start : start + _CHUNK] += _attention(q[start : start + _CHUNK], k)
    return total / (rows * heads)


def _attention(queries: Tensor, keys: Tensor) -> Tensor:
    scale = queries.shape[-1] ** -0.5
    scores = einsum(queries.float(), keys.float(), "... p d, ... n d -> ... p n")
    return (scores * scale).softmax(-1)


def joined(maps: Mapping[Grid, Tensor], weights: Mapping[Grid, int]) -> Tensor:
    """One map of the finest of the grids, the weighted mean of a map (h, w) for each grid."""
    finest = max(maps)
    parts = [_resized(maps[grid], finest) * weights[grid] for grid in maps]
    return torch.stack(parts).sum(0) / sum(weights[grid] for grid in maps)


def propagate(
    map_: Tensor, affinities: Mapping[Grid, Tensor], weights: Mapping[Grid, int]
) -> Tensor:
    """A map (h, w) in which alike cells look alike; the map itself without affinities.

    ``affinities``: grid -> (P, P) as `affinity` makes it, joined by ``weights``.
    """
    if not affinities:
        return map_
    maps = {
        grid: (alike @ _resized(map_, grid).flatten()).unflatten(0, grid)
        for grid, alike in affinities.items()
    }
    return _resized(joined(maps, weights), (map_.shape[0], map_.shape[1]))


def _resized(map_: Tensor, grid: Grid) -> Tensor:
    if tuple(map_.shape) == grid:
        return map_
    if grid[0] < map_.shape[0]:
        return F.interpolate(map_[None, None], grid, mode="area")[0, 0]
    return F.interpolate(map_[None, None], grid, mode="bilinear", align_corners=False)[0, 0]
