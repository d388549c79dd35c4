"""UCE: replacing, moderating, debiasing and preserving concepts (arXiv 2308.14761, section 4).

One vector stands for a concept, the encoding of its phrase's last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..text.encoded_prompt import EncodePrompts, check_prompt
from .constraints import Constraints
from .counts import Counted, next_pushes
from .erasure import Erasure, swaps
from .even_sample import Rows

RIDGE = 0.5
"""lambda of the authors."""


@dataclass(frozen=True)
class Debiasing:
    """A concept whose pictures shall show its attributes in other shares.

    Attributes:
        concept: the phrase, such as "doctor".
        attributes: phrases, such as "female doctor" and "male doctor".
        measured: shares of the attributes in pictures of the concept, as the model draws it now.
        wanted: shares to reach; equal ones when empty.
        step: how far to push for a share that is wrong by 1.
        earlier: what was counted and pushed before, in order.
    """

    concept: str
    attributes: tuple[str, ...]
    measured: tuple[float, ...]
    wanted: tuple[float, ...] = ()
    step: float = 1.0
    earlier: tuple[Counted, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.attributes)
        if count < 2:
            raise ValueError(
                f"expected at least two attributes to balance in {self.concept!r}, found {count}"
            )
        for name in ("measured", "wanted"):
            shares = getattr(self, name)
            if name == "wanted" and not shares:
                continue
            if len(shares) != count or min(shares) < 0 or abs(sum(shares) - 1) > 0.01:
                raise ValueError(
                    f"expected {count} {name} shares that add up to 1, one for each attribute, "
                    f"found {', '.join(f'{share:g}' for share in shares) or 'none'}"
                )
        if not self.step > 0:
            raise ValueError(f"expected a step above 0, found {self.step}")

    @property
    def pushes(self) -> tuple[float, ...]:
        """How much of each attribute to add, see `next_pushes`. Their sum is 0."""
        count = len(self.attributes)
        wanted = self.wanted or (1 / count,) * count
        return next_pushes(self.measured, wanted, self.step, self.earlier)


def concept_vectors(encode: EncodePrompts, phrases: Sequence[str]) -> Rows:
    """The encoding of the last token of each phrase alone.

    Raises:
        ValueError: for an empty phrase.
    """
    checked = [check_prompt("phrase", phrase) for phrase in phrases]
    return torch.stack([found.encodings[found.last_word] for found in encode(checked)])


def replacement_constraints(
    encode: EncodePrompts, erasures: Sequence[Erasure], sentences: Sequence[str] = ("{}",)
) -> Constraints:
    """The last token of each phrase as the last token of its anchor, in every sentence.

    Raises:
        ValueError: for a sentence that has not one place for the phrase.
    """
    parts = []
    for swap in swaps(encode, erasures, sentences):
        last, other = swap.phrase.stop - 1, swap.anchor.stop - 1
        parts.append(
            Constraints(swap.source.encodings[[last]], swap.destination.encodings[[other]])
        )
    return Constraints.join(parts)


def moderation_constraints(encode: EncodePrompts, phrases: Sequence[str]) -> Constraints:
    """Concepts that shall mean no more than an empty prompt does: its end, or its last token."""
    (empty,) = encode([""])
    inputs = concept_vectors(encode, phrases)
    nothing = empty.encodings[min(empty.end, len(empty.tokens) - 1)]
    return Constraints(inputs, nothing.expand_as(inputs))


def preserving_constraints(
    encode: EncodePrompts, phrases: Sequence[str], weight: float
) -> Constraints:
    """Concepts that shall stay as they are, each counting as much as `weight` others."""
    inputs = concept_vectors(encode, phrases)
    return Constraints(inputs, inputs, torch.full((len(inputs),), float(weight)))


def debias_constraints(encode: EncodePrompts, debiasings: Sequence[Debiasing]) -> Constraints:
    """Concepts pushed towards the attributes they show too rarely and away from the others.

    v = W (c + sum_i alpha_i a_i) with alpha_i in proportion to the share that is missing, summed in
    fp64. As in the paper the shares are measured again after an edit, and a further edit follows
    until they are met; what was counted before shortens its step (`next_pushes`).

    Raises:
        ValueError: when the shares are met already.
    """
    parts = []
    for debiasing in debiasings:
        concept = concept_vectors(encode, [debiasing.concept]).to(torch.float64)
        attributes = concept_vectors(encode, debiasing.attributes).to(torch.float64)
        pushes = torch.tensor(debiasing.pushes, dtype=torch.float64).to(attributes)
        if not bool((pushes != 0).any()):
            raise ValueError(
                f"the measured shares of {debiasing.concept!r} are the wanted ones: there is "
                "nothing to edit"
            )
        parts.append(Constraints(concept, concept + pushes @ attributes))
    return Constraints.join(parts)
