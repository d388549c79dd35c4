"""Local key locking (Perfusion, section 4.2): the keys of a concept are its superclass's."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..shapes import Encodings, Vector


def locked_outputs(
    project: Callable[[str, Encodings], Tensor], names: Iterable[str], superclass_encoding: Vector
) -> dict[str, Tensor]:
    """``o_K = W_K e_super`` for every layer, through the layer's own forward.

    The keys follow the model in use, so they are computed again for each model and never stored.

    Args:
        project: (name, encodings) -> the unedited key projection of the attention ``name``.
        names: of the attentions.
        superclass_encoding: what the keys are locked to.

    Returns:
        Name -> output (d,), without gradient.

    Raises:
        ValueError: for no layers and for an encoding that is not a vector.
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
