"""Cross-attention of the small world's UNet: recorded, and taught where the things are.

A large model learns from very many pictures that the word for a thing is looked at by the pixels of
that thing; editing a word's keys and values rests on it. The small world sees too few pictures for
that and so gets told: the renderer knows every thing's place (the idea of TokenCompose, Wang et
al., 2023).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

INSIDE = 0.7
"""Share of a thing's pixels' attention that its words should get; the rest is for scene, style."""


def recording(maps: list[Tensor]) -> dict[str, Any]:
    """``transformer_options`` under which each cross-attention appends its map to ``maps``.

    A map (n, pixels, tokens) is the mean over the heads. Self-attention, whose queries are its
    keys, is left to ComfyUI.
    """

    def attend(
        plain: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any
    ) -> Tensor:
        if k.shape[1] == q.shape[1]:
            return plain(q, k, v, heads, **options)
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        map_ = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        maps.append(map_.mean(1))
        return (map_ @ v).transpose(1, 2).flatten(2)

    return {"optimized_attention_override": attend}


def attention_loss(maps: list[Tensor], owners: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy between what the words of a thing get of a pixel's attention and its mask.

    ``maps`` (n, side * side, tokens) of any sides; ``owners`` (n, tokens): even for words
    about the first thing, odd for those about the second, -1 for others; ``masks`` (n, 2, h, w).
    Things without words do not count.
    """
    own = torch.stack([owners % 2 == 0, (owners % 2 == 1) & (owners >= 0)], 2)
    own = (own & (owners >= 0)[..., None]).float()
    present = (own.sum(1) > 0)[:, None].float()  # n 1 2
    total = own.new_zeros(())
    for map_ in maps:
        side = int(map_.shape[1] ** 0.5)
        target = F.interpolate(masks, size=(side, side), mode="area").flatten(2).transpose(1, 2)
        share = (map_ @ own).clamp(1e-4, 1 - 1e-4)
        loss = F.binary_cross_entropy(share, INSIDE * target, reduction="none")
        total = total + (loss * present).sum() / (present.sum() * side * side).clamp(min=1)
    return total / len(maps)
