"""How much of a forward pass is kept for the backward pass, found without computing it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from .checkpointing import BLOCKS
from .differentiable import make_differentiable

META = torch.device("meta")


@dataclass(frozen=True)
class Kept:
    """Bytes kept between the passes.

    Attributes:
        everything: without gradient checkpointing.
        checkpointed: with it; the inputs of the blocks and what lies between them.
        block: what the largest block keeps while it is computed again.
        tensor: the largest single tensor; gradients need room for a few of that size.
    """

    everything: int
    checkpointed: int
    block: int
    tensor: int


def kept_by_unet(
    config: Mapping[str, Any], rows: int, height: int, width: int, tokens: int, dtype: torch.dtype
) -> Kept:
    """What a UNet of a ComfyUI configuration keeps of `rows` latents (height, width).

    Runs the UNet's own code on tensors without contents. Weights are frozen and the text
    encodings need gradients, as in training.
    """
    operations: Any = _Operations
    unet = UNetModel(**{**config, "dtype": dtype}, device=META, operations=operations)
    unet.requires_grad_(False)
    count = _Count(unet.parameters())
    for block in unet.modules():
        if isinstance(block, BLOCKS):
            block.forward = functools.partial(count.within, block.forward, object())
    empty = functools.partial(torch.empty, device=META, dtype=dtype)
    context = empty(rows, tokens, config["context_dim"], requires_grad=True)
    pooled = config.get("adm_in_channels")
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count.keep, lambda x: x):
        unet(
            empty(rows, config["in_channels"], height, width),
            torch.empty(rows, device=META),
            context=context,
            y=None if pooled is None else empty(rows, pooled),
            transformer_options={"optimized_attention_override": _attention},
        )
    return count.result()


def kept_by_transformer(
    network: torch.nn.Module,
    config: Mapping[str, Any],
    latent: Sequence[int],
    text: tuple[int, int],
    dtype: torch.dtype,
) -> Kept:
    """What a network like this keeps of latents of a shape (B, C, ..., h, w).

    Args:
        network: of the class; nothing of its weights is used.
        config: ComfyUI's configuration of it.
        latent: the shape.
        text: number and width of the encodings.
        dtype: what it computes in.
    """
    like: Any = type(network)
    made: torch.nn.Module = like(
        **{**config, "dtype": dtype}, device=META, operations=comfy.ops.disable_weight_init
    )
    made.requires_grad_(False)
    make_differentiable(made)
    count = _Count(made.parameters())
    for block in made.modules():
        if isinstance(block, BLOCKS):
            block.forward = functools.partial(count.within, block.forward, object())
    empty = functools.partial(torch.empty, device=META, dtype=dtype)
    masked = "attention_mask" in inspect.signature(made.forward).parameters
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count.keep, lambda x: x):
        made(
            empty(*latent),
            torch.empty(latent[0], device=META),
            context=empty(latent[0], *text, requires_grad=True),
            transformer_options={"optimized_attention_override": _attention},
            **({"attention_mask": None} if masked else {}),
        )
    return count.result()


# Of a transformer's block, in numbers a token and channel: what enters the norms and the residual
# sums, queries, keys and values, the attention's output, and the hidden layer, 4 wide, twice.
_OF_A_BLOCK = 20


def kept_by_blocks(blocks: int, rows: int, tokens: int, width: int, dtype: torch.dtype) -> Kept:
    """What a transformer keeps, calculated: for those whose code needs contents to run."""
    tensor = rows * tokens * width * dtype.itemsize
    block = _OF_A_BLOCK * tensor
    return Kept(blocks * block, blocks * tensor, block, 4 * tensor)


class _Count:
    """Counts storages once, however many tensors share them, and never weights."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = [weight.untyped_storage() for weight in weights]
        self._known = {storage._cdata for storage in self._weights}
        self._places: dict[object, dict[int, torch.UntypedStorage]] = {None: {}}
        self._inputs: dict[object, dict[int, torch.UntypedStorage]] = {None: {}}
        self._place: object = None

    def within(self, forward: Callable[..., Any], place: object, *args: Any, **kwargs: Any) -> Any:
        """Run a block; what is kept meanwhile is the block's."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        self._inputs[place] = {storage._cdata: storage for storage in storages}
        self._places[place] = {}
        self._place, before = place, self._place
        try:
            return forward(*args, **kwargs)
        finally:
            self._place = before

    def keep(self, tensor: Tensor) -> Tensor:
        """Note a tensor that is kept."""
        storage = tensor.untyped_storage()
        # A storage is told by its address, which nothing else gets while it is held here.
        if storage._cdata not in self._known:
            self._places[self._place][storage._cdata] = storage
        return tensor

    def result(self) -> Kept:
        """The sums."""
        everything = self._union(self._places.values())
        # A block before the first cross-attention keeps nothing, and so not its inputs either.
        inputs = [self._inputs[place] for place, kept in self._places.items() if kept]
        between = self._union([self._places[None], *inputs])
        blocks = [_bytes(kept) for place, kept in self._places.items() if place is not None]
        return Kept(
            everything=_bytes(everything),
            checkpointed=_bytes(between),
            block=max(blocks, default=0),
            tensor=max((storage.nbytes() for storage in everything.values()), default=0),
        )

    @staticmethod
    def _union(
        places: Iterable[dict[int, torch.UntypedStorage]],
    ) -> dict[int, torch.UntypedStorage]:
        return {key: storage for place in places for key, storage in place.items()}


def _bytes(storages: Mapping[int, torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages.values())


class _Operations:
    """torch's own layers: ComfyUI's may put off making their weights."""

    Linear = torch.nn.Linear
    Conv2d = torch.nn.Conv2d
    GroupNorm = torch.nn.GroupNorm
    LayerNorm = torch.nn.LayerNorm

    @staticmethod
    def conv_nd(_: int, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """A convolution in two dimensions, which is all these UNets have."""
        return torch.nn.Conv2d(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """Keeps what fused attention keeps: its inputs and its output, but no attention map."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Output (B, N, heads d) like the queries."""
        # Heads apart (B, heads, N, d) come back as (B, N, heads d).
        joined = (q.shape[0], q.shape[2], q.shape[1] * q.shape[3]) if q.ndim == 4 else q.shape
        out = q.new_empty(joined)
        ctx.save_for_backward(q, k, v, out)
        return out


def _attention(_: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _Attention.apply(q, k, v)  # pyright: ignore[reportReturnType]
