"""When and where a concept acts: a range of the sampling, a gate that moves through it, blocks."""

from __future__ import annotations

from dataclasses import dataclass

from .gate import Gate


@dataclass(frozen=True)
class GateSchedule:
    """A concept's gate over the course of sampling; outside of it the concept does not exist.

    Attributes:
        start: part of the sampling, 0 (pure noise) to 1 (the picture), from which it acts.
        end: part of the sampling up to which it acts.
        bias: its value at the start and at the end; between them the gate moves linearly.
        temperature: the same.
        blocks: the parts of the model the concept acts in, none meaning all; what the names stand
            for is the host's business.

    Raises:
        ValueError: for an empty or impossible range and for values the gate cannot take.
    """

    start: float
    end: float
    bias: tuple[float, float]
    temperature: tuple[float, float]
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"expected a range with 0 <= start < end <= 1, found {self.start} to {self.end}; "
                "to leave a concept out altogether set its strength to 0"
            )
        for bias, temperature in zip(self.bias, self.temperature, strict=True):
            Gate(bias, temperature)

    @property
    def is_still(self) -> bool:
        """Whether the gate is the same all through the range."""
        return len(set(self.bias)) == len(set(self.temperature)) == 1

    def gate(self, progress: float) -> tuple[float, float]:
        """Bias and temperature at a part of the sampling; beyond the range those of its ends."""
        part = (progress - self.start) / (self.end - self.start)
        part = min(max(part, 0.0), 1.0)
        return _between(self.bias, part), _between(self.temperature, part)


def _between(ends: tuple[float, float], part: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * part
