"""Which concepts act in which layer at which moment of sampling."""

from __future__ import annotations

import bisect
import operator
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from comfy.model_sampling import ModelSamplingDiscrete
from torch import Tensor

from ...perfusion.concept.concept import Concept
from ...perfusion.gated.rank_one import Basis
from ..models.blocks import layers_in

Acting = tuple[int, ...]
"""Numbers of the concepts that act, in their order."""

_POINTS = 1000


class NoiseSchedule(Protocol):
    """What is needed of ComfyUI's `model_sampling`."""

    def percent_to_sigma(self, percent: float) -> float:
        """The noise level at a part of the sampling, 0 to 1."""
        ...


class Agenda:
    """The schedules of some concepts over the layers of a model.

    Layers in which the same concepts may act form a group; at each moment a group's `Acting` is
    what is left of them. What is compared with the prompts ``together`` makes of those that act.
    """

    def __init__(
        self,
        concepts: Sequence[Concept],
        layers: Sequence[str],
        together: Callable[[Sequence[Concept]], Basis],
    ) -> None:
        self.concepts = tuple(concepts)
        self._together = together
        where = [
            frozenset(layers) if c.schedule is None else layers_in(c.schedule.blocks, layers)
            for c in concepts
        ]
        self.groups: dict[str, Acting] = {
            layer: tuple(at for at, places in enumerate(where) if layer in places)
            for layer in layers
        }
        self._bases: dict[Acting, Basis] = {}
        for acting in sorted(self._possible()):
            self.basis(acting)

    @cached_property
    def scheduled(self) -> bool:
        """Whether anything depends on the moment."""
        schedules = [c.schedule for c in self.concepts if c.schedule is not None]
        return not all(s.start == 0 and s.end == 1 and s.is_still for s in schedules)

    def basis(self, acting: Acting) -> Basis:
        """The directions of these concepts combined, in fp32 on the CPU.

        Raises:
            ValueError: for concepts that cannot act together.
        """
        if acting not in self._bases:
            basis = self._together([self.concepts[at] for at in acting])
            self._bases[acting] = basis.to(torch.device("cpu"), torch.float32)
        return self._bases[acting]

    def gates(self, acting: Acting, progress: float) -> tuple[list[float], list[float]] | None:
        """Biases and temperatures at a moment, None where no schedule sets them."""
        chosen = [self.concepts[at] for at in acting]
        if all(concept.schedule is None for concept in chosen):
            return None
        pairs = [
            (c.gate.bias, c.gate.temperature) if c.schedule is None else c.schedule.gate(progress)
            for c in chosen
        ]
        return [bias for bias, _ in pairs], [temperature for _, temperature in pairs]

    def _possible(self) -> set[Acting]:
        """What may act together, so that what cannot is refused before anything runs."""
        schedules = [concept.schedule for concept in self.concepts]
        moments = {0.0} | {point for s in schedules if s for point in (s.start, s.end)}
        now = [
            {at for at, s in enumerate(schedules) if s is None or s.start <= moment <= s.end}
            for moment in moments
        ]
        sets = {
            tuple(at for at in group if at in acting)
            for group in set(self.groups.values())
            for acting in now
        }
        return sets - {()}


class Clock:
    """Tells from the noise level how far the sampling of one model is.

    All it needs of the noise schedule is read once, into a table.
    """

    def __init__(self, sampling: NoiseSchedule) -> None:
        self._sampling = weakref.ref(sampling)
        self._ends: dict[float, float] = {}
        # ComfyUI puts the very ends outside of the schedule.
        points = torch.linspace(0, 1, _POINTS + 1, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        self._points: list[float] = points.tolist()
        # They fall from the noise's to the picture's end.
        self._sigmas: list[float] = _sigmas(sampling, points).tolist()

    def acting(self, concepts: Sequence[Concept], sigma: float) -> set[int]:
        """The concepts whose range holds a noise level, as ComfyUI's timestep ranges hold it."""
        return {
            at
            for at, concept in enumerate(concepts)
            if concept.schedule is None
            or self._end(concept.schedule.end) <= sigma <= self._end(concept.schedule.start)
        }

    def progress(self, sigma: float) -> float:
        """The part of the sampling done, 0 to 1."""
        after = bisect.bisect_left(self._sigmas, -sigma, key=operator.neg)
        if not 0 < after < len(self._points):
            return 0.0 if after == 0 else 1.0
        higher, lower = self._sigmas[after - 1 : after + 1]
        start, end = self._points[after - 1 : after + 1]
        return start + (end - start) * (higher - sigma) / (higher - lower)

    def _end(self, percent: float) -> float:
        if percent not in self._ends:
            sampling = self._sampling()
            if sampling is None:
                raise RuntimeError("a noise schedule was deleted while it was sampled with")
            self._ends[percent] = float(sampling.percent_to_sigma(percent))
        return self._ends[percent]


_clocks: WeakKeyDictionary[NoiseSchedule, Clock] = WeakKeyDictionary()


def clock_of(sampling: NoiseSchedule) -> Clock:
    """The clock of a noise schedule, made once for each.

    Nodes such as ModelSamplingDiscrete put another noise schedule into the same model.
    """
    found = _clocks.get(sampling)
    if found is None:
        found = _clocks[sampling] = Clock(sampling)
    return found


def _sigmas(sampling: NoiseSchedule, points: Tensor) -> Tensor:
    """The noise levels at parts of the sampling, as `percent_to_sigma` gives them one by one."""
    if isinstance(sampling, ModelSamplingDiscrete) and _discrete(sampling):
        # Its formula for all of them at once: each by itself would be read from the device.
        return sampling.sigma((1.0 - points) * 999.0).detach().cpu().float()
    return torch.tensor([float(sampling.percent_to_sigma(float(point))) for point in points])


def _discrete(sampling: ModelSamplingDiscrete) -> bool:
    return type(sampling).percent_to_sigma is ModelSamplingDiscrete.percent_to_sigma
