"""What a user would want to know of a sampling run, from what its conditionings say of themselves.

The text encoder writes into a conditioning which placeholders it knew and which of them it found
(see `text.twin_encoder`). Nothing is guessed from gates: an empty prompt may open one a little,
and a word that resembles the concept opens it more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...perfusion.concept.concept import Concept
from ..text.twin import placeholders_in
from ..text.twin_encoder import SPOKEN, Spoken
from .key_locks import KeyLock

Conditioning = Mapping[str, Any]
"""One entry of a sampling run's conditionings, as ComfyUI's guiders hold them."""


# What is carried along a prompt's encoding, and what is wrong and can be done without it.
_LOST: Mapping[KeyLock, str] = {
    "global": "the everyday word's encoding beside it, so its keys are not locked; use local key "
    "lock with that node",
    "twin": "what names the concept beside its everyday word, so the everyday word is drawn; leave "
    "that node out",
}


def prompt_hints(
    concepts: Sequence[Concept], conditionings: Iterable[Conditioning], key_lock: KeyLock
) -> list[str]:
    """One sentence for each concept that the prompts of a run leave without effect."""
    known: set[str] = set()
    present: set[str] = set()
    locked: set[str] = set()
    for conditioning in conditionings:
        spoken = conditioning.get(SPOKEN)
        if isinstance(spoken, Spoken):
            known |= spoken.known
            present |= spoken.present
        locked |= placeholders_in(conditioning.get("cross_attn"))
    present |= locked
    hints = []
    for word in (concept.placeholder for concept in concepts):
        if word not in present:
            hints.append(
                f"no prompt says {word}, so its concept has little to do: write {word} where the "
                "concept should be"
                if word in known
                else f"no prompt was encoded by a text encoder that knows {word}: use the CLIP "
                f"output of the node that applied the concept, and write {word} in the prompt"
            )
        elif key_lock in _LOST and word not in locked:
            hints.append(
                "a node between the prompt and the sampler changes the encoding of "
                f"{word} in a way that loses {_LOST[key_lock]}"
            )
    return hints


def schedule_hints(concepts: Sequence[Concept], acted: set[int]) -> list[str]:
    """One sentence for each concept whose schedule met no step of a run."""
    return [
        f"the schedule of {concept.placeholder} met no step of this sampling run; use more steps "
        "or a longer range"
        for at, concept in enumerate(concepts)
        if at not in acted
    ]
