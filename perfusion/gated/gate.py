"""The gate of a concept: when it opens, how softly, and how much of the edit then applies."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Below it a similarity divided by the temperature may leave the range of fp32.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Gate:
    """``g = sigmoid((s - bias) / temperature)``, and the blend ``h' = (1 - w) W e + w h``.

    Attributes:
        bias: beta, the similarity at which the gate is half open; lower opens it more readily.
        temperature: tau, how softly it opens, at least 1e-6.
        strength: w, how much of the edit is applied; 0 is the unedited projection.

    Raises:
        ValueError: for NaN, infinity, and a temperature the formula cannot take.
    """

    bias: float = 0.65
    temperature: float = 0.15
    strength: float = 1.0

    def __post_init__(self) -> None:
        for name in ("bias", "strength"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, found {value}")
        if not (math.isfinite(self.temperature) and self.temperature >= LEAST_TEMPERATURE):
            raise ValueError(
                f"temperature: expected a finite number above 0 (at least {LEAST_TEMPERATURE:g}), "
                f"found {self.temperature}"
            )


INFERENCE_GATE = Gate()
"""The paper's gate for one concept with local key lock."""
TRAINING_GATE = Gate(bias=0.75, temperature=0.1)
"""The paper's gate in training."""
