"""Local key locking (Perfusion, section 4.2): the keys of a concept are its superclass's."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def locked_outputs(
    project: Callable[[str, Tensor], Tensor], names: Iterable[str], superclass_encoding: Tensor
) -> dict[str, Tensor]:
    """``o_K = W_K e_super`` for every layer, through the layer's own forward.

    ``project(name, encodings)`` maps (1, 1, D) to (1, 1, d) with the unedited key projection of
    the attention ``name``; ``superclass_encoding`` has shape (D,). Returns name -> (d,), without
    gradient. The keys follow the model in use, so they are computed again for each model and
    never stored. Raises ValueError for no layers and for an encoding that is not a vector.
    """
    if superclass_encoding.ndim != 1:
        raise ValueError(
            f"expected a superclass encoding of shape (D,), found "
            f"{tuple(superclass_encoding.shape)}"
        )
    with torch.no_grad():
        token = superclass_encoding.detach()[None, None]
        outputs = {name: project(name, token).reshape(-1) for name in names}
    if not outputs:
        raise ValueError("expected at least one cross-attention layer to lock, found none")
    return outputs
