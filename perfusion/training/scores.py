"""Which checkpoint of a training run to keep (Perfusion, section 5: image against text similarity).

The longer a concept is trained, the more its pictures look like the training pictures and the less
they show what else the prompt asks for. The rule: **the checkpoint with the largest geometric mean
of both similarities; of equal ones the earliest.** A checkpoint thus wins when it gains more in one
similarity than it loses in the other, in proportion. The geometric mean needs no normalisation
over the run: the two similarities live on different scales, only ratios count, and adding or
leaving out a checkpoint never changes the order of the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """How good the pictures of one checkpoint are.

    Attributes:
        step: it was made after this many, counted from 1 (0: the plain superclass, to compare).
        image: mean cosine in [-1, 1] with the training pictures.
        prompt: mean cosine in [-1, 1] with what the prompts ask for.

    Raises:
        ValueError: naming the step, when a cosine is none.
    """

    step: int
    image: float
    prompt: float

    def __post_init__(self) -> None:
        for name in ("image", "prompt"):
            value = getattr(self, name)
            # Rounding may carry a cosine a little beyond 1.
            if not (math.isfinite(value) and abs(value) <= 1.001):
                raise ValueError(
                    f"step {self.step}: expected the {name} similarity from -1 to 1, found "
                    f"{value}; look at the checkpoint's pictures, or choose it yourself"
                )

    @property
    def both(self) -> float:
        """The geometric mean of both similarities; a negative one counts as none."""
        return math.sqrt(max(self.image, 0.0) * max(self.prompt, 0.0))


def mean_similarity(embeddings: Tensor, references: Tensor) -> float:
    """Mean cosine between every embedding (n, d) and every reference (m, d)."""
    return float(unit(embeddings).mean(0) @ unit(references).mean(0))


def paired_similarity(embeddings: Tensor, references: Tensor) -> float:
    """Mean cosine between each embedding (n, d) and the reference (n, d) of the same row."""
    if embeddings.shape != references.shape:
        raise ValueError(
            f"expected as many references as embeddings {tuple(embeddings.shape)}, found "
            f"{tuple(references.shape)}"
        )
    return float((unit(embeddings) * unit(references)).sum(1).mean())


def unit(embeddings: Tensor) -> Tensor:
    """Embeddings (n, d) at length 1, in fp64.

    Raises:
        ValueError: for none, for NaN or infinity, and for one without length.
    """
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise ValueError(f"expected embeddings (n, d), found {tuple(embeddings.shape)}")
    exact = embeddings.double()
    lengths = exact.norm(dim=1, keepdim=True)
    if not (bool(torch.isfinite(lengths).all()) and float(lengths.min()) > 0):
        raise ValueError(
            "expected finite embeddings other than zero, found "
            f"lengths from {float(lengths.min())} to {float(lengths.max())}"
        )
    return exact / lengths


def best(scores: Sequence[Score]) -> Score:
    """The score of the checkpoint to keep, by the rule above.

    Raises:
        ValueError: for no scores, and for two of one step.
    """
    if not scores:
        raise ValueError("expected the scores of at least one checkpoint, found none")
    steps = sorted(score.step for score in scores)
    for one, other in pairwise(steps):
        if one == other:
            raise ValueError(f"expected one score for each checkpoint, found two of step {one}")
    return max(scores, key=lambda score: (score.both, -score.step))


def table(scores: Sequence[Score], plain: Score | None = None) -> str:
    """The scores in the order of their steps, the best one marked.

    ``plain`` is what the pictures of the superclass alone score, for comparison.
    """
    chosen = best(scores)
    lines = [f"{'step':>6}  image  prompt  both"]
    if plain is not None:
        lines.append(_row("plain", plain))
    for score in sorted(scores, key=lambda score: score.step):
        mark = "  <- chosen" if score == chosen else ""
        lines.append(_row(str(score.step), score) + mark)
    return "\n".join(lines)


def _row(name: str, score: Score) -> str:
    return f"{name:>6}  {score.image:5.3f}  {score.prompt:6.3f}  {score.both:.3f}"
