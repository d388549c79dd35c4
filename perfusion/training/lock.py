"""What a learner asks of a key lock: where the concept starts, and the text of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from .denoiser import Conditioning, Projections


class TrainingError(Exception):
    """Why training cannot go on from here; what was learned before is good."""


class StepText(Protocol):
    """The prompts of one step, encoded."""

    def rows(self, chosen: Tensor | None) -> tuple[Conditioning, Projections | None]:
        """What the model is conditioned on and the edit, of rows (n,) or of all.

        The graph behind the conditioning, if there is one, is shared by all that are asked for.
        """
        ...


class Lock(Protocol):
    """A way to lock the keys of one run.

    Attributes:
        superclass_encoding: what keys are locked to and values start at (D,) fp32.
        i: the target input (D,) fp64 on the CPU.
        embeddings: text encoder -> the placeholder's vector, fp32.
        values: layer -> o_V, fp32.
        keys: layer -> o_K, fp32; none where keys are the twin's.
    """

    superclass_encoding: Tensor
    i: Tensor
    embeddings: dict[str, Tensor]
    values: dict[str, Tensor]
    keys: dict[str, Tensor]

    def text(self, prompts: Sequence[str], follow: bool) -> StepText:
        """The prompts (B,) of a step.

        Args:
            prompts: with the placeholder in them.
            follow: whether i may move, which happens once for each step.

        Raises:
            TrainingError: for NaN or infinity in the encoding.
        """
        ...

    def restore(self, i: Tensor) -> None:
        """Take an i of before."""
        ...


def parameters(tensors: Mapping[str, Tensor], trainable: bool) -> dict[str, Tensor]:
    """Copies in fp32, with gradients where they are trained."""
    return {
        name: tensor.detach().float().clone().requires_grad_(trainable)
        for name, tensor in tensors.items()
    }
