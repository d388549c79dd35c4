"""Casting a network leaves what must be fp32 as it is.

u and e cancel in their scalar product, and Adam's steps (its epsilon is 0 in half precision) turn
a parameter in fp16 into NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

Cast = Callable[[Tensor], Tensor]


def moving_only(cast: Cast, tensors: Iterable[Tensor | None]) -> Cast:
    """The function of `nn.Module._apply` that moves ``tensors`` but keeps their dtype.

    Gradients of parameters among them stay as they are too.
    """
    kept = [tensor for tensor in tensors if tensor is not None]
    grads = [tensor.grad for tensor in kept if isinstance(tensor, nn.Parameter)]
    protected = {id(tensor) for tensor in [*kept, *grads] if tensor is not None}

    def move(tensor: Tensor) -> Tensor:
        found = cast(tensor)
        # Only a change of dtype is undone: a tensor may come from nowhere (meta) or go there.
        if id(tensor) not in protected or found.dtype == tensor.dtype:
            return found
        return tensor.to(found.device)

    return move
