"""How far to push a debiased concept after earlier counts (ours; the paper's step is fixed).

A share answers a push as a steep, saturating curve. A step in proportion to what is missing can
then leap from one side of the target to the other, again and again. Two counts on both sides hold
the target between them, and the next push goes to where the line between them meets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Shares = tuple[float, ...]


@dataclass(frozen=True)
class Counted:
    """Shares that were counted, and the push that followed.

    Attributes:
        shares: of the attributes, before the push.
        pushes: how much of each attribute was then added.
    """

    shares: Shares
    pushes: Shares


def next_pushes(
    measured: Shares, wanted: Shares, step: float, earlier: Sequence[Counted] = ()
) -> Shares:
    """How much of each attribute to add; the sum is 0, as that of the missing shares.

    An attribute without an earlier count on the other side of its target gets step times what is
    missing of it (UCE). One with such a count goes the way back to it as far as the straight line
    through both says (regula falsi), where that is shorter.

    Args:
        measured: shares counted now.
        wanted: shares to reach.
        step: how far to push for a share that is wrong by 1.
        earlier: what was counted and pushed before, in order.
    """
    pushes = [
        _push(wanted[at] - now, step, _places(at, wanted[at], earlier))
        for at, now in enumerate(measured)
    ]
    mean = sum(pushes) / len(pushes)
    return tuple(push - mean for push in pushes)


def _places(at: int, wanted: float, earlier: Sequence[Counted]) -> list[tuple[float, float]]:
    # Of one attribute: how far behind each count lies, and what was missing there.
    found, behind = [], 0.0
    for count in reversed(earlier):
        behind -= count.pushes[at]
        found.append((behind, wanted - count.shares[at]))
    return found


def _push(missing: float, step: float, places: Sequence[tuple[float, float]]) -> float:
    shortest = step * missing
    for behind, then in places:
        # The way back leads where the share grows if it is too small, else it says nothing.
        if then * missing < 0 < behind * missing:
            part = behind * missing / (missing - then)
            shortest = min(shortest, part, key=abs)
    return shortest
