"""One rule for concepts of different strengths, continuous in every strength.

Let ``E_S`` be a projection edited with the concepts S (Appendix B for these; ``E_{} = W e``).
Strengths ``w_c >= 0`` give::

    h = W e + integral over t > 0 of (E_{c: w_c > t} - W e) dt

The set only changes where t passes a strength, so the integral is the finite sum over `levels`.

* Every w = 1: all concepts below t = 1 and none above, so h is Appendix B's.
* One concept: ``h = (1 - w) W e + w E``.
* w_c = 0: c is in no set, as if it were not there, so the limit w_c -> 0 needs no exception.
* Continuous: from w to w' the set changes only for t between a ``w_c`` and its ``w'_c``, that is
  on a length of at most ``sum_c |w_c - w'_c|``, and there by at most ``2 max_S |E_S - W e|``.

Negative strengths are mirrored: the integral over ``{c: w_c < -t}``, subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def levels(strengths: Sequence[float]) -> list[tuple[float, tuple[int, ...]]]:
    """The sets of concepts that act together, with how much each of their edits counts.

    Args:
        strengths: w, one for each concept.

    Returns:
        Pairs (part, concepts): ``h = W e + sum of part * (E_concepts - W e)``. A concept's parts
        add up to its strength; concepts of strength 0 are in no set.
    """
    found: list[tuple[float, tuple[int, ...]]] = []
    for sign in (1.0, -1.0):
        sizes = [sign * strength for strength in strengths]
        steps = sorted({size for size in sizes if size > 0}, reverse=True)
        for step, below in pairwise([*steps, 0.0]):
            concepts = tuple(at for at, size in enumerate(sizes) if size >= step)
            found.append((sign * (step - below), concepts))
    return found
