"""Training as the paper does it: the placeholder's vector is learned, and i follows its encoding.

Where the vector starts is ours (`TrainingConfig.vector_start`): i, which starts as the mean of its
first encodings, hardly leaves the place where it starts in a few hundred steps. Beginning at the
superclass, the everyday word would open the concept's gate as wide as the placeholder does.

Keys are locked at the concept's own token (or learned, the paper's ablation); textual inversion is
the same without an edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gated.covariance import Covariance
from ..gated.key_lock import locked_outputs
from ..gated.rank_one import Basis, Direction, GatedProjections, combine, gated_inputs
from .config import TrainingConfig
from .denoiser import Conditioning, Denoiser
from .encodings import last_marked, placeholder_encoding, superclass_encoding
from .lock import TrainingError, parameters


class LocalLock:
    """Implements `lock.Lock`."""

    def __init__(self, denoiser: Denoiser, config: TrainingConfig, covariance: Covariance) -> None:
        self._denoiser = denoiser
        self._config = config
        self._covariance = covariance
        encoding = superclass_encoding(denoiser, config)
        self.superclass_encoding = encoding
        apart = config.learns_vector_and_outputs and config.vector_start == "random"
        vectors = denoiser.random_embeddings() if apart else denoiser.initial_embeddings()
        self.embeddings = parameters(vectors, True)
        first = placeholder_encoding(denoiser, config, self.embeddings) if apart else encoding
        self.i = first.to("cpu", torch.float64)
        covariance.dual(self.i)  # a covariance of another width is an error before any work
        layers = denoiser.layers
        keys = locked_outputs(lambda layer, e: denoiser.project(layer, "k", e), layers, encoding)
        values = locked_outputs(lambda layer, e: denoiser.project(layer, "v", e), layers, encoding)
        self.values = parameters(values, config.edits)
        self.keys = parameters(keys, config.mode == "trained_keys")

    def text(self, prompts: Sequence[str], follow: bool) -> LocalText:
        """The prompts of a step, with gradients into the placeholder's vector."""
        different = list(dict.fromkeys(prompts))
        with torch.enable_grad():
            encoded = self._denoiser.encode(different, self.embeddings)
            if len(different) < len(prompts):
                encoded = encoded.rows(torch.tensor([different.index(p) for p in prompts]))
        if follow:
            newest = last_marked(encoded, prompts, self._config.placeholder).detach().mean(0)
            newest = newest.to("cpu", torch.float64)
            if not bool(torch.isfinite(newest).all()):
                raise TrainingError("its text encoding holds NaN or infinity")
            self.i = self._config.ema * self.i + (1 - self._config.ema) * newest
        basis = self._basis(encoded.encodings) if self._config.edits else None
        return LocalText(encoded, basis, self.keys, self.values)

    def restore(self, i: Tensor) -> None:
        """Take an i of before."""
        self.i = i

    def _basis(self, encodings: Tensor) -> Basis:
        """The edit's direction of this step, where the encodings are."""
        config = self._config
        u = self._covariance.dual(self.i)
        direction = Direction(i=self.i, u=u, gate=config.gate, name=config.placeholder)
        dtype = torch.promote_types(encodings.dtype, torch.float32)
        return combine([direction]).to(encodings.device, dtype)


@dataclass(frozen=True, eq=False)
class LocalText:
    """Implements `lock.StepText`; without a basis there is no edit."""

    encoded: Conditioning
    basis: Basis | None
    keys: dict[str, Tensor]
    values: dict[str, Tensor]

    def rows(self, chosen: Tensor | None) -> tuple[Conditioning, GatedProjections | None]:
        """What the model is conditioned on and the edit, of rows (n,) or of all."""
        text = self.encoded if chosen is None else self.encoded.rows(chosen)
        if self.basis is None:
            return text, None
        inputs, gates = gated_inputs(text.encodings, self.basis)
        keys = {layer: output[None] for layer, output in self.keys.items()}
        values = {layer: output[None] for layer, output in self.values.items()}
        return text, GatedProjections(inputs, gates, keys, values)
