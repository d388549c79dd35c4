"""The vectors and gates of a network's concepts, in fp32 whatever the network is cast to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

import torch
from torch import Tensor, nn

from ..gated.covariance import Covariance
from ..gated.gate import Gate
from ..shapes import Vector
from .following import Averages
from .kept import Kept
from .metric import Metric, as_metric
from .precision import moving_only

VECTORS = ("i", "u", "superclass_encoding")


class ConceptVectors(nn.Module):
    """Target inputs, their duals, superclass encodings and gates of k concepts.

    Args:
        width: D, the width of the text encodings.
        num_concepts: k.
        C: the second moment of the encodings, None for the plain scalar product.
        gate: every concept's gate at inference, to begin with.

    Attributes:
        i, u, superclass_encoding: (k, D).
        gates: (k, 3), bias, temperature and strength at inference.
        initialised: (k,) bool, which concepts there are.
        metrics: for each concept what its dual is made with.

    Raises:
        ValueError: for no concepts, and for a C that is no covariance of this width.
    """

    i: Tensor
    u: Tensor
    superclass_encoding: Tensor
    gates: Tensor
    initialised: Tensor

    def __init__(
        self, width: int, num_concepts: int, C: Tensor | Covariance | None, gate: Gate
    ) -> None:
        super().__init__()
        if num_concepts < 1:
            raise ValueError(f"num_concepts: expected at least 1, found {num_concepts}")
        metric = None if C is None else as_metric(C, width)
        self.metrics: tuple[Metric | None, ...] = (metric,) * num_concepts
        for name in VECTORS:
            self.register_buffer(name, torch.zeros(num_concepts, width))
        self.register_buffer("gates", torch.tensor([astuple(gate)]).repeat(num_concepts, 1))
        self.register_buffer("initialised", torch.zeros(num_concepts, dtype=torch.bool))
        self.writes = 0  # how often `forget` was called
        self._started: Kept[list[bool]] = Kept()

    @property
    def num_concepts(self) -> int:
        """k."""
        return self.i.shape[0]

    @property
    def width(self) -> int:
        """D."""
        return self.i.shape[1]

    def started(self, concept: int) -> bool:
        """Whether a concept was trained or loaded."""
        return self._started.get((self.initialised,), self.initialised.tolist, self.writes)[concept]

    def set(
        self,
        concept: int,
        i: Vector,
        superclass_encoding: Vector,
        u: Vector | None = None,
        gate: Gate | None = None,
    ) -> None:
        """Put a concept in place, with its gate at inference. Without ``u`` it is C^-1 i.

        Raises:
            ValueError: for vectors of another width.
        """
        for name, vector in (("i", i), ("superclass_encoding", superclass_encoding), ("u", u)):
            if vector is not None and vector.shape != (self.width,):
                raise ValueError(f"{name}: expected ({self.width},), found {tuple(vector.shape)}")
        self._put(concept, Averages(i, superclass_encoding), u)
        with torch.no_grad():
            if gate is not None:
                self.gates[concept] = torch.tensor(astuple(gate)).to(self.gates)
            self.initialised[concept] = True

    def set_gate(
        self,
        concept: int = 0,
        *,
        bias: float | None = None,
        temperature: float | None = None,
        strength: float | None = None,
    ) -> None:
        """Change a concept's gate at inference (beta, tau, strength); None keeps a value.

        Raises:
            ValueError: for values the gate cannot take.
        """
        before = self.gates[concept].tolist()
        asked = (bias, temperature, strength)
        gate = Gate(*(old if new is None else new for old, new in zip(before, asked, strict=True)))
        with torch.no_grad():
            self.gates[concept] = torch.tensor(astuple(gate)).to(self.gates)

    def forget(self) -> None:
        """Drop what was computed from the vectors; needed only after writing through ``.data``."""
        self.writes += 1

    @torch.no_grad()
    def _put(self, concept: int, averages: Averages, u: Vector | None = None) -> None:
        """Write i, its dual, and the superclass's encoding."""
        metric = self.metrics[concept]
        if u is None:
            u = averages.i.detach() if metric is None else metric.dual(averages.i)
        self.i[concept] = averages.i.to(self.i)
        self.u[concept] = u.to(self.u)
        self.superclass_encoding[concept] = averages.superclass.to(self.i)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConceptVectors:
        super()._apply(
            moving_only(fn, [getattr(self, name) for name in (*VECTORS, "gates")]), recurse
        )
        return self
