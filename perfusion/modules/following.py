"""How ``i`` follows a concept's encoding: once per optimiser step, as the mean of what it saw.

A step may show many batches (accumulated gradients), and each of them many times (every layer
shows it, and again when gradient checkpointing runs a forward twice). While a step lasts, a batch
is projected with ``i`` moved towards that batch alone, from where the step started, so that a
forward that is run again gives the same again. When the step ends, ``i`` has moved towards the
mean over all its batches, as if they had been one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..shapes import Encodings, Vector


@dataclass(frozen=True, eq=False)
class Averages:
    """The two averages of one concept: of its own encoding and of its superclass's."""

    i: Vector
    superclass: Vector

    def towards(self, encoding: Vector, superclass: Vector | None, decay: float) -> Averages:
        """Both moved: ``decay`` of what they were, the rest new; None leaves an average."""
        return Averages(
            torch.lerp(encoding, self.i, decay),
            self.superclass
            if superclass is None
            else torch.lerp(superclass, self.superclass, decay),
        )


@dataclass(eq=False)
class ShownPrompts:
    """Some prompts as a step saw them.

    Attributes:
        places: (B,), where each prompt has the concept.
        encoding: mean encoding at these places.
        superclass: the same of the prompts with the superclass word, if they were shown.
        times: how often the batch was shown.
    """

    places: Tensor
    encoding: Vector
    superclass: Vector | None
    times: int = 0


@dataclass(eq=False)
class Step:
    """One optimiser step of one concept: where it started, and its batches so far."""

    start: Averages
    batches: list[ShownPrompts] = field(default_factory=list)
    latest: Latest | None = None

    def shows(self, batch: ShownPrompts, encodings: Encodings, places: Tensor) -> None:
        """Count a batch that a layer shows."""
        batch.times += 1
        self.latest = Latest(encodings, places, batch)

    def shows_again(
        self, encodings: Encodings, places: Tensor, superclass: Encodings | None
    ) -> bool:
        """Whether these are the very tensors shown last; then they are counted."""
        latest = self.latest
        if latest is None or not latest.is_of(encodings, places):
            return False
        if superclass is not None and latest.batch.superclass is None:
            return False
        latest.batch.times += 1
        return True

    def find(self, encodings: Encodings, places: Tensor | None = None) -> ShownPrompts | None:
        """The batch of these encodings; without ``places``, by those of each batch."""
        if self.latest is not None and self.latest.is_of(encodings, places):
            return self.latest.batch
        for batch in self.batches:
            at = batch.places if places is None else places
            fits = encodings.ndim == 3 and at.shape == encodings.shape[:1]
            if (
                fits
                and int(at.max()) < encodings.shape[1]
                and torch.equal(mean_at(encodings, at).to(batch.encoding), batch.encoding)
            ):
                return batch
        return None

    def ended(self, decay: float) -> Averages:
        """The averages after the step: moved towards the mean over its batches."""
        # Every layer shows each batch equally often, so this weighs batches by their prompts.
        weights = [batch.times * len(batch.places) for batch in self.batches]
        encoding = _mean([batch.encoding for batch in self.batches], weights)
        assert encoding is not None  # a step begins with a batch
        superclass = _mean([batch.superclass for batch in self.batches], weights)
        return self.start.towards(encoding, superclass, decay)


class Latest:
    """The very tensors a batch came as, so that the next layer's need not be looked at."""

    def __init__(self, encodings: Tensor, places: Tensor, batch: ShownPrompts) -> None:
        self.batch = batch
        self._encodings = weakref.ref(encodings)
        self._places = weakref.ref(places)
        self._versions = _versions(encodings, places)

    def is_of(self, encodings: Tensor, places: Tensor | None) -> bool:
        """Whether these are the same tensors, unchanged."""
        known = self._places()
        if (
            known is None
            or self._encodings() is not encodings
            or (places is not None and places is not known)
        ):
            return False
        return self._versions is not None and self._versions == _versions(encodings, known)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A weak reference cannot be copied; a copy looks at its first batch once more.
        return type(None), ()


def mean_at(encodings: Encodings, places: Tensor) -> Vector:
    """Mean over prompts of the encodings at each one's place (B,), in fp32; no gradient."""
    rows = torch.arange(len(places), device=encodings.device)
    return encodings.detach()[rows, places.to(encodings.device)].float().mean(0)


def check_places(encodings: Encodings, places: Tensor) -> None:
    """Check that places (B,) are positions in the encodings.

    Raises:
        ValueError: for shapes that do not fit each other.
        IndexError: for positions that do not exist.
    """
    if encodings.ndim != 3 or places.shape != encodings.shape[:1]:
        raise ValueError(
            f"expected text encodings (B, N, D) and concept_indices (B,), found "
            f"{tuple(encodings.shape)} and {tuple(places.shape)}"
        )
    low, high = (int(end) for end in places.aminmax())
    if low < 0 or high >= encodings.shape[1]:
        raise IndexError(
            f"concept_indices: expected positions 0 to {encodings.shape[1] - 1} in sequences of "
            f"{encodings.shape[1]} tokens, found {low} to {high}"
        )


def _mean(vectors: Sequence[Tensor | None], weights: Sequence[int]) -> Tensor | None:
    """The weighted mean of the vectors that are there, None for none."""
    shown = [(v, weight) for v, weight in zip(vectors, weights, strict=True) if v is not None]
    if not shown:
        return None
    total = sum(weight for _, weight in shown)
    return torch.stack([vector * (weight / total) for vector, weight in shown]).sum(0)


def _versions(*tensors: Tensor) -> tuple[int, ...] | None:
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple(tensor._version for tensor in tensors)
