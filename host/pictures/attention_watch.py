"""Watching the attention of a UNet while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...perfusion.masks.attention import Grid, affinity, joined, propagate, word_share

# A layer must have this share of the latent's rows and this many, to know about shapes.
_SHARE, _FEWEST = 4, 8
# Cells beyond which a layer's self-attention is not looked at: its square would fill the memory.
_MOST_ALIKE = 64 * 64


class AttentionWatch:
    """Sums up what the layers of a UNet look at, over all calls with one picture.

    `word` (N,) bool tells the tokens of the word among those of the prompt, `rows` how many the
    latent has; without `self_attention` it stays with what the cells see themselves.
    """

    def __init__(self, word: Tensor, rows: int, self_attention: bool = True) -> None:
        # Numbers instead of a mask: counting a mask anew in every layer waits for the device.
        self._word = word.nonzero().flatten()
        self._most_alike = _MOST_ALIKE if self_attention else 0
        self._fewest = rows / _SHARE
        self._over_text = False
        self._looks: dict[Grid, Tensor] = {}
        self._alike: dict[Grid, Tensor] = {}
        self._counts: dict[Grid, int] = {}
        self._alike_counts: dict[Grid, int] = {}

    def options(self) -> dict[str, Any]:
        """`transformer_options` for a model call under this watch."""
        return {
            "patches": {"attn2_patch": [self._before_text]},
            "optimized_attention_override": self._attend,
        }

    def result(self) -> tuple[Tensor, int]:
        """The picture's map (h, w), and the rows of the coarsest layers in it."""
        fine = [grid for grid in self._looks if min(grid) >= _FEWEST] or [max(self._looks)]
        looks = {grid: self._looks[grid] / self._counts[grid] for grid in fine}
        alike = {
            grid: self._alike[grid] / self._alike_counts[grid]
            for grid in fine
            if grid in self._alike
        }
        map_ = joined(looks, self._counts)
        return propagate(map_, alike, self._alike_counts), min(fine)[0]

    def _before_text(self, queries: Tensor, context: Tensor, value: Tensor, _: Any) -> Any:
        # Self-attention and cross-attention take the same way from here on, one after the other.
        self._over_text = True
        return queries, context, value

    def _attend(
        self, plain: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, **rest: Any
    ) -> Tensor:
        over_text, self._over_text = self._over_text, False
        height, width = rest["transformer_options"]["activations_shape"][-2:]
        if height >= self._fewest:
            self._see((height, width), over_text, *(_by_head(each, heads) for each in (q, k)))
        return plain(q, k, v, heads, **rest)

    def _see(self, grid: Grid, over_text: bool, queries: Tensor, keys: Tensor) -> None:
        if over_text:
            seen = word_share(queries, keys, self._word).sum(0).unflatten(0, grid)
            self._looks[grid] = self._looks.get(grid, 0) + seen
            self._counts[grid] = self._counts.get(grid, 0) + len(queries)
        elif queries.shape[2] <= self._most_alike:
            self._alike[grid] = self._alike.get(grid, 0) + affinity(queries, keys)
            self._alike_counts[grid] = self._alike_counts.get(grid, 0) + 1


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """(B, P, H * d) -> (B, H, P, d)"""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)
