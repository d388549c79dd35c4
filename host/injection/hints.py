"""What a user would want to know when a concept had nothing to do in a sampling run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from ...perfusion.concept.concept import Concept
from .agenda import Acting

logger = logging.getLogger("perfusion")

# A gate that opens less than this has no visible effect.
_SHUT = 0.1
# A gate this open belongs to the placeholder itself; the superclass word stays below it.
_OPEN = 0.8


class Hints:
    """Watches the gates of a run and says at its end, once for each concept, what was odd."""

    def __init__(self, concepts: Sequence[Concept], global_lock: bool) -> None:
        self._concepts = concepts
        self._global_lock = global_lock
        self._seen: dict[int, Tensor] = {}
        self._peaks: list[tuple[Acting, Tensor]] = []
        self._twins = False
        self._ran = False
        self._given: set[tuple[int, str]] = set()

    def watch(self, gates: Mapping[Acting, Tensor], has_twin: bool) -> None:
        """Note the gates (B, N, k) of one model call, by the concepts that act."""
        self._ran = True
        self._twins = self._twins or has_twin
        for acting, opened in gates.items():
            # The same tensor comes with every step; held, so that its id stays its own.
            if id(opened) not in self._seen:
                self._seen[id(opened)] = opened
                self._peaks.append((acting, opened.flatten(0, -2).amax(0)))

    def give(self) -> None:
        """Log what there is to say of the run that ends."""
        if not self._ran:
            return
        highest: dict[int, float] = {}
        for acting, peaks in self._peaks:
            for at, peak in zip(acting, peaks.tolist(), strict=True):
                highest[at] = max(highest.get(at, 0.0), peak)
        for at, concept in enumerate(self._concepts):
            if at not in highest:
                self._say(
                    at,
                    f"the schedule of {concept.placeholder!r} met no step of this sampling run; "
                    "use more steps or a longer range",
                )
            elif highest[at] < _SHUT * min(1.0, abs(concept.gate.strength)):
                self._say(
                    at,
                    f"no word of the prompts opens the gate of {concept.placeholder!r}: write "
                    f"{concept.placeholder} where the concept should be, and use the CLIP output "
                    "of the node that applied it",
                )
            elif self._global_lock and not self._twins and highest[at] > _OPEN:
                self._say(
                    at,
                    f"a prompt speaks of {concept.placeholder!r} but was not encoded for global "
                    "key lock, so its keys are not locked; use the CLIP output of the node that "
                    "applied the concept",
                )

    def clear(self) -> None:
        """Forget the run."""
        self._seen.clear()
        self._peaks.clear()
        self._twins = self._ran = False

    def _say(self, at: int, text: str) -> None:
        if (at, text) not in self._given:
            self._given.add((at, text))
            logger.warning("%s", text)
