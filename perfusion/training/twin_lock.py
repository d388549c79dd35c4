"""Training with the twin lock (`gated.twin_lock`): values alone are learned.

The placeholder's vector is fixed, so every prompt is encoded once, before the first step: as it
stands (e) and with the superclass in the placeholder's place (t, its twin). The target input i is
the mean of e at the placeholder (in each text encoder, where several are read), and with it the
gates are fixed as well. A step then knows the model and tensors only; no text encoder runs in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gated.covariance import Covariance
from ..gated.key_lock import locked_outputs
from ..gated.twin_lock import TwinProjections, twin_direction, twin_gates, twin_inputs
from .config import TrainingConfig
from .denoiser import Conditioning, Denoiser, stacked_rows
from .encodings import finite_encoding, marked_in_parts, training_prompts
from .lock import parameters


class TwinLock:
    """Implements `lock.Lock`."""

    def __init__(self, denoiser: Denoiser, config: TrainingConfig, covariance: Covariance) -> None:
        self._config = config
        self.embeddings = parameters(denoiser.random_embeddings(), False)
        prompts = tuple(dict.fromkeys(training_prompts(config, config.placeholder)))
        self._row = {prompt: row for row, prompt in enumerate(prompts)}
        named, twin = _encoded(denoiser, prompts, self.embeddings, config.batch_size)
        denoiser.release_text()
        parts = covariance.columns
        self._parts = covariance.parts
        own = marked_in_parts(named, prompts, config.placeholder, parts)
        i = own.to("cpu", torch.float64).mean(1).mean(0)
        self.i = finite_encoding(i, config.placeholder)
        places = marked_in_parts(twin, prompts, config.placeholder, parts).float().mean(1)
        self.superclass_encoding = finite_encoding(places.mean(0), config.superclass)
        self.values = parameters(self._first_values(denoiser, places), True)
        self.keys: dict[str, Tensor] = {}
        self._named = named.encodings
        self._prompts = self._gated(twin)

    def text(self, prompts: Sequence[str], follow: bool) -> TwinText:
        """The prompts of a step, encoded long ago; i stays where it is."""
        rows = torch.tensor([self._row[prompt] for prompt in prompts])
        return TwinText(self._prompts, rows, self.values)

    def restore(self, i: Tensor) -> None:
        """Take an i of before, and open the gates by it."""
        if not torch.equal(i, self.i):
            self.i = i
            self._prompts = self._gated(self._prompts.twin)

    @staticmethod
    def _first_values(denoiser: Denoiser, places: Tensor) -> dict[str, Tensor]:
        """The superclass's values, the mean over its places (P, D) in the encodings' parts."""
        found = [
            locked_outputs(lambda layer, e: denoiser.project(layer, "v", e), denoiser.layers, place)
            for place in places
        ]
        return {name: torch.stack([each[name] for each in found]).mean(0) for name in found[0]}

    def _gated(self, twin: Conditioning) -> GatedTwins:
        config = self._config
        superclass = self.superclass_encoding.to(self.i)
        direction = twin_direction(self.i, superclass, config.gate, config.placeholder, self._parts)
        gates = twin_gates(self._named, twin.encodings, [direction])
        return GatedTwins(twin, twin_inputs(twin.encodings, gates), gates)


@dataclass(frozen=True, eq=False)
class GatedTwins:
    """Prompts and all that the twin lock makes of them.

    Attributes:
        twin: t, what the model is conditioned on.
        inputs: of the values, (B, N, D).
        gates: (B, N, 1).
    """

    twin: Conditioning
    inputs: Tensor
    gates: Tensor


@dataclass(frozen=True, eq=False)
class TwinText:
    """Implements `lock.StepText`: the prompts of every row, and the values under training."""

    prompts: GatedTwins
    at: Tensor
    values: dict[str, Tensor]

    def rows(self, chosen: Tensor | None) -> tuple[Conditioning, TwinProjections]:
        """What the model is conditioned on and the edit, of rows (n,) or of all."""
        at = self.at if chosen is None else self.at[chosen]
        twin = self.prompts.twin.rows(at)
        inputs = stacked_rows(self.prompts.inputs, at)
        gates = stacked_rows(self.prompts.gates, at)
        values = {layer: output[None] for layer, output in self.values.items()}
        return twin, TwinProjections(twin.encodings, inputs, gates, values)


def _encoded(
    denoiser: Denoiser, prompts: Sequence[str], embeddings: dict[str, Tensor], at_once: int
) -> tuple[Conditioning, Conditioning]:
    """Every prompt as it stands and its twin, encoded a few at a time."""
    found = []
    with torch.no_grad():
        for start in range(0, len(prompts), at_once):
            found.append(denoiser.encode_twins(prompts[start : start + at_once], embeddings))
    return _joined([named for named, _ in found]), _joined([twin for _, twin in found])


def _joined(parts: Sequence[Conditioning]) -> Conditioning:
    extras = [part.extra for part in parts if part.extra is not None]
    return Conditioning(
        torch.cat([part.encodings for part in parts]),
        torch.cat([part.mask for part in parts]),
        torch.cat(extras) if extras else None,
    )
