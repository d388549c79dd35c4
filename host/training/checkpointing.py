"""Gradient checkpointing: what a block computed is computed again instead of being kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from comfy.clip_model import CLIPLayer
from comfy.ldm.cosmos.predict2 import Block as CosmosBlock
from comfy.ldm.hydit.models import HunYuanDiTBlock
from comfy.ldm.lightricks.model import BasicTransformerBlock as LtxvBlock
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.ldm.pixart.pixartms import PixArtMSBlock
from comfy.ldm.wan.model import WanAttentionBlock

from ..models.families import UnsupportedModelError

BLOCKS = (
    *(BasicTransformerBlock, ResBlock, CLIPLayer),
    *(CosmosBlock, WanAttentionBlock, PixArtMSBlock, LtxvBlock, HunYuanDiTBlock),
)
"""Found by structure: the parts of UNets and text encoders that keep most, and little go in."""

Remember = Callable[[], AbstractContextManager[None]]


def checkpoint_blocks(module: torch.nn.Module, remember: Remember = nullcontext) -> int:
    """Make the blocks of a private copy keep their inputs only; returns how many there are.

    A block runs again during the backward pass, when what surrounded its first run has passed.
    `remember` is called at the first run and returns a context in which the second takes place.

    Raises:
        UnsupportedModelError: when there is no such block.
    """
    blocks = [block for block in module.modules() if isinstance(block, BLOCKS)]
    if not blocks:
        kinds = ", ".join(kind.__name__ for kind in BLOCKS)
        raise UnsupportedModelError(
            f"gradient checkpointing: expected blocks of the kinds {kinds}, found none in a "
            f"{type(module).__name__}; train without it"
        )
    for block in blocks:
        block.forward = functools.partial(_recomputed, block.forward, remember)
    return len(blocks)


def _recomputed(forward: Callable[..., Any], remember: Remember, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if "transformer_options" in kwargs:
        # The model goes on to write in it where it is; the second run must read what the first did.
        kwargs["transformer_options"] = dict(kwargs["transformer_options"])
    context = remember()
    return torch.utils.checkpoint.checkpoint(
        forward,
        *args,
        use_reentrant=False,
        # Nothing in these blocks is random while they are frozen.
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), context),
        **kwargs,
    )
