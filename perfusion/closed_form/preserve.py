"""What an edit shall leave as it is: a prior for the solver and a sample to see the drift on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..gated.covariance import Covariance
from ..shapes import Moment
from ..text.encoded_prompt import EncodedPrompt
from .even_sample import EvenSample, Rows

SAMPLE = 64


@dataclass(frozen=True, eq=False)
class Preserved:
    """Prompts and statistics to preserve.

    Attributes:
        prior: P, fp64: weight times the sum over all tokens of the prompts, plus the statistics'
            mean over tokens times their own weight.
        sample: at most 64 of the preserved encodings, to measure the drift on; padding that says
            the same again and again is in it once a prompt.
        texts: the prompts.
    """

    prior: Moment
    sample: Rows
    texts: tuple[str, ...]


def preserve(
    prompts: Iterable[EncodedPrompt],
    weight: float,
    covariance: Covariance | None = None,
    covariance_weight: float = 0.0,
) -> Preserved:
    """Preserve these prompts, every token, padding included, and what the statistics stand for.

    Args:
        prompts: looked at once, one after the other.
        weight: how much each token counts beside a constraint's 1.
        covariance: statistics of captions.
        covariance_weight: as how many tokens the statistics count.

    Raises:
        ValueError: when nothing is to be preserved, for negative weights, and for statistics of
            encodings of another width.
    """
    if weight < 0 or covariance_weight < 0:
        raise ValueError(f"expected weights of at least 0, found {weight} and {covariance_weight}")
    prior = None if covariance is None else covariance_weight * covariance.matrix
    sample, texts = EvenSample(SAMPLE), []
    for prompt in prompts:
        rows = prompt.encodings[prompt.first :].detach().to("cpu", torch.float64)
        width = rows.shape[1]
        if prior is None:
            prior = torch.zeros(width, width, dtype=torch.float64)
        if len(prior) != width:
            raise ValueError(
                f"the statistics are of encodings {len(prior)} wide, the prompts' are "
                f"{width} wide; measure them with this text encoder"
            )
        prior.addmm_(rows.mT, rows, alpha=weight)
        sample.add(_without_repeats(rows))
        texts.append(prompt.text)
    if prior is None:
        raise ValueError("expected prompts or statistics to preserve, found neither")
    kept = sample.rows()
    none = torch.zeros(0, len(prior), dtype=torch.float64)
    return Preserved(prior, kept[0] if kept else none, tuple(texts))


def _without_repeats(rows: Rows) -> Rows:
    # Some text encoders fill up to 512 tokens; an even sample would hold hardly a word.
    new = torch.ones(len(rows), dtype=torch.bool)
    new[1:] = (rows[1:] != rows[:-1]).any(dim=1)
    return rows[new]
