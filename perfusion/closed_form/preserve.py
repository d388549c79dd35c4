"""What an edit shall leave as it is: a prior for the solver and a sample to see the drift on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gated.covariance import Covariance
from ..text.encoded_prompt import EncodedPrompt

SAMPLE = 64


@dataclass(frozen=True, eq=False)
class Preserved:
    """Prompts and statistics to preserve.

    Attributes:
        prior: P, (D, D) fp64: weight times the sum over all tokens of the prompts, plus the
            statistics' mean over tokens times their own weight.
        sample: encodings (at most 64, D) among the preserved ones, to measure the drift on.
        texts: the prompts.
    """

    prior: Tensor
    sample: Tensor
    texts: tuple[str, ...]


def preserve(
    prompts: Sequence[EncodedPrompt],
    weight: float,
    covariance: Covariance | None = None,
    covariance_weight: float = 0.0,
) -> Preserved:
    """Preserve these prompts, every token, padding included, and what the statistics stand for.

    ``weight``: how much each token counts beside a constraint's 1. ``covariance_weight``: as how
    many tokens the statistics count. Raises ValueError when nothing is to be preserved.
    """
    if covariance is None and not prompts:
        raise ValueError("expected prompts or statistics to preserve, found neither")
    if weight < 0 or covariance_weight < 0:
        raise ValueError(f"expected weights of at least 0, found {weight} and {covariance_weight}")
    priors, samples = [], []
    if prompts:
        rows = torch.cat([prompt.encodings[prompt.first :] for prompt in prompts])
        rows = rows.detach().to("cpu", torch.float64)
        priors.append(weight * rows.mT @ rows)
        step = -(-len(rows) // SAMPLE)
        samples.append(rows[::step])
    if covariance is not None:
        if prompts and covariance.width != priors[0].shape[0]:
            raise ValueError(
                f"the statistics are of encodings {covariance.width} wide, the prompts' are "
                f"{priors[0].shape[0]} wide; measure them with this text encoder"
            )
        priors.append(covariance_weight * covariance.matrix)
    width = priors[0].shape[0]
    sample = samples[0] if samples else torch.zeros(0, width, dtype=torch.float64)
    return Preserved(torch.stack(priors).sum(0), sample, tuple(each.text for each in prompts))
