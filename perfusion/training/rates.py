"""How far a step goes: the units that learning rates are counted in.

Adam moves every number by about its rate whatever the gradient, so a rate means the more the
smaller the numbers are. A relative rate counts in the root mean square of what is learned, and
so means the same for every layer and model:

    of a layer's outputs    rms^2 = mean over features of diag(W C W^T) = |W L|_F^2 / d,  C = L L^T
    of a token vector       rms of the rows of its text encoder's token table
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor

from ..gated.covariance import Covariance
from ..gated.rank_one import Part
from .config import TrainingConfig
from .denoiser import Denoiser


def output_rms(denoiser: Denoiser, layer: str, part: Part, covariance: Covariance) -> float:
    """The root mean square of a layer's keys or values over the captions of the covariance.

    The rows of L^T have the second moment C when they are added up, so the layer's own forward
    of them gives it without its weight being known.

    Raises:
        ValueError: for NaN or infinity.
    """
    rows = rearrange(covariance.factor, "d n -> 1 n d").float()
    # As large as encodings, for what is not linear before the layer; a power of two rounds nothing.
    scale = 2.0 ** round(math.log2(rows.shape[1]) / 2)
    with torch.no_grad():
        outputs = denoiser.project(layer, part, rows * scale).float()
    rms = float(outputs.norm()) / scale / math.sqrt(outputs.shape[-1])
    if not math.isfinite(rms):
        raise ValueError(
            f"layer {layer!r}: expected finite {'keys' if part == 'k' else 'values'}, found NaN or "
            "infinity; train in another precision"
        )
    return rms


def full_rate(
    denoiser: Denoiser, config: TrainingConfig, covariance: Covariance, kind: str, name: str
) -> float:
    """The learning rate of one tensor at the start of its schedule.

    Args:
        denoiser: what is trained with.
        config: the rates and their unit.
        covariance: of the text encodings.
        kind: "embedding", "v" or "k".
        name: of the text encoder, or of the layer.
    """
    rate = config.embedding_learning_rate if kind == "embedding" else config.learning_rate
    if config.rate_unit == "absolute":
        return rate
    if kind == "embedding":
        return rate * denoiser.token_rms(name)
    return rate * output_rms(denoiser, name, "k" if kind == "k" else "v", covariance)


def parameter_groups(rated: Iterable[tuple[Tensor, float]]) -> list[dict[str, object]]:
    """Adam's groups: those of one rate together."""
    groups: dict[float, list[Tensor]] = {}
    for parameter, rate in rated:
        groups.setdefault(rate, []).append(parameter)
    return [{"params": tensors, "lr": rate} for rate, tensors in groups.items()]
