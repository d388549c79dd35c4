"""Names for parts of a model: down, middle, up, or a block as it is called in the model."""

from __future__ import annotations

from collections.abc import Sequence

LEVELS = {"down": "input_blocks", "middle": "middle_block", "up": "output_blocks"}


def layers_in(blocks: Sequence[str], layers: Sequence[str]) -> frozenset[str]:
    """The cross-attention layers in these blocks; no blocks: all layers.

    Raises:
        ValueError: for a block without such a layer, listing those the model has.
    """
    if not blocks:
        return frozenset(layers)
    found: set[str] = set()
    for block in blocks:
        path = LEVELS.get(block.lower(), block)
        inside = {layer for layer in layers if f"{layer}.".startswith(f"{path}.")}
        if not inside:
            raise ValueError(
                f"the model has no cross-attention in a block {block!r}; expected some of: "
                f"{', '.join(LEVELS)}, {', '.join(block_names(layers))}"
            )
        found |= inside
    return frozenset(found)


def block_names(layers: Sequence[str]) -> list[str]:
    """The blocks of these layers, in the model's order: input_blocks.1, middle_block, ..."""
    names = [
        ".".join(layer.split(".")[: 1 if layer.startswith(LEVELS["middle"]) else 2])
        for layer in layers
    ]
    return list(dict.fromkeys(names))
