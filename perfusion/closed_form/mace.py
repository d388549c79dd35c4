"""MACE's refinement: what stands around a phrase stops speaking of it (MACE, section 3.1).

In a prompt, the words around a phrase carry its meaning too. For many sentences, every token but
the phrase's own gets the keys and values it has when the anchor stands in the phrase's place. In
MACE the phrase itself is then dealt with by training; the closed form alone leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..text.encoded_prompt import EncodePrompts
from .constraints import Constraints
from .erasure import Erasure, Swap, swaps
from .matching import match_tail

SENTENCES: tuple[str, ...] = (
    "{}",
    "a {}",
    "the {}",
    "a photo of a {}",
    "a photo of the {}",
    "a picture of a {}",
    "an image of a {}",
    "a photograph of a {}",
    "a close-up of a {}",
    "a portrait of a {}",
    "a painting of a {}",
    "a drawing of a {}",
    "a sketch of a {}",
    "a cartoon of a {}",
    "an illustration of a {}",
    "a small {}",
    "a large {}",
    "an old {}",
    "a beautiful {}",
    "a {} on the beach",
    "a {} in the forest",
    "a {} in the city",
    "a {} in the snow",
    "a {} in the desert",
    "a {} in space",
    "a {} in a room",
    "a {} at night",
    "a {} on a table",
    "a {} next to a tree",
    "two people looking at a {}",
    "a photo of a {} in the mountains",
    "a photo of a {} on the street",
    "a person with a {}",
    "a {} in front of a house",
)
"""Sentences with one place for a phrase (MACE uses about thirty)."""


def refinement_constraints(
    encode: EncodePrompts, erasures: Sequence[Erasure], sentences: Sequence[str] = SENTENCES
) -> Constraints:
    """Every token of the sentences but the phrases' own, as if the anchor stood there.

    For many erasures call it for one at a time and hand the parts to the solver one by one; all at
    once take some 10 MB each.

    Raises:
        ValueError: for a sentence that has not one place for the phrase.
    """
    return Constraints.join([_around(swap) for swap in swaps(encode, erasures, sentences)])


def _around(swap: Swap) -> Constraints:
    source, destination, phrase = swap.source, swap.destination, swap.phrase
    shift = swap.anchor.stop - phrase.stop
    positions = [*range(phrase.start), *range(phrase.stop, source.end)]
    matched = [at if at < phrase.start else at + shift for at in positions]
    positions += range(source.end, len(source.tokens))
    matched += match_tail(source, destination)
    return Constraints(source.encodings[positions], destination.encodings[matched])
