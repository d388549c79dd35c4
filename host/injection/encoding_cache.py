"""What the projections of a model share during a model call, and calls during a sampling run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...perfusion.gated.rank_one import Basis, edited_inputs, gated_inputs, open_gates
from .agenda import Acting, Agenda

# Prompts and their combinations in one run; more means that they change all the time.
_MOST_ENTRIES = 16


@dataclass(eq=False)
class _Entry:
    """One encoding as it comes to the model, and what was computed from it."""

    encodings: Tensor
    keys: Tensor
    edited: dict[Acting, tuple[Tensor, Tensor]] = field(default_factory=dict)
    gates: dict[tuple[Acting, Any], Tensor] = field(default_factory=dict)


class RunCache:
    """x' and similarities of the encodings of one sampling run, computed at their first use.

    ComfyUI hands a new tensor to every model call, put together of the same conditionings; it
    names them in `uuids`. Values are compared too, for other packs may change them in between.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, _Entry] = {}

    def entry(self, name: Any, encodings: Tensor, keys: Tensor) -> _Entry:
        """The entry of encodings (B, N, D) and what their keys are made of; None has no name."""
        found = None if name is None else self._entries.get(name)
        if found is not None and _same(found.encodings, encodings):
            return found
        found = _Entry(encodings, keys)
        if name is not None:
            if len(self._entries) >= _MOST_ENTRIES:
                self._entries.clear()
            self._entries[name] = found
        return found

    def clear(self) -> None:
        """Forget everything: the run is over."""
        self._entries.clear()


class SharedInputs:
    """x' and the gates of the encoding at hand, for all layers in which the same concepts act.

    A model call hands one and the same tensor to all its layers; it is recognised by identity
    and held, so its memory cannot be reused meanwhile. `forget` ends that after each call.
    """

    def __init__(self, group: Acting, agenda: Agenda) -> None:
        self.group = group
        self.acting: Acting = group
        self._agenda = agenda
        self.basis: Basis | None = None
        self._bases: dict[Acting, Basis] = {}
        self.encodings: Tensor | None = None
        self.keys: Tensor | None = None
        self.inputs: Tensor | None = None
        self.gates: Tensor | None = None

    def of(self, encodings: Tensor) -> tuple[Tensor, Tensor]:
        """x' (B, N, D) and gates (B, N, k) of encodings (B, N, D), both in their dtype."""
        if self.encodings is not encodings or self.inputs is None or self.gates is None:
            if self.basis is None:
                self.basis = self._agenda.basis(self.acting)
            self.inputs, gates = gated_inputs(encodings, self.basis)
            self.gates = gates.to(encodings.dtype)
            self.encodings = encodings
        return self.inputs, self.gates

    def keys_of(self, encodings: Tensor) -> Tensor:
        """What the keys of the encodings at hand are made of: their twin.

        Raises:
            RuntimeError: for other encodings than those the model was called with.
        """
        if self.keys is None or self.encodings is not encodings:
            raise RuntimeError(
                "global key lock needs the prompt as it was encoded, and another node changes it "
                "inside the model (an attn2_patch, as regional prompting packs use); use local key "
                "lock with that node"
            )
        return self.keys

    def act(self, acting: set[int] | None) -> bool:
        """Let only these concepts act from now on (None: all); whether that is a change."""
        now = self.group if acting is None else tuple(at for at in self.group if at in acting)
        changed = now != self.acting
        self.acting = now
        return changed

    def begin(self, entry: _Entry, progress: float) -> None:
        """Make everything ready for one model call."""
        self.forget()
        if not self.acting:
            return
        encodings = entry.encodings
        basis = self._basis_on(encodings.device)
        if self.acting not in entry.edited:
            inputs, similarity, _ = edited_inputs(encodings, basis)
            entry.edited[self.acting] = inputs, similarity
        inputs, similarity = entry.edited[self.acting]
        moved = self._agenda.gates(self.acting, progress)
        if moved is not None:
            basis = basis.with_gates(*moved)
        name = (self.acting, None if moved is None else (tuple(moved[0]), tuple(moved[1])))
        if name not in entry.gates:
            entry.gates = {key: value for key, value in entry.gates.items() if key[0] != name[0]}
            entry.gates[name] = open_gates(similarity, basis).to(encodings.dtype)
        self.basis = basis
        self.encodings, self.keys = encodings, entry.keys
        self.inputs, self.gates = inputs, entry.gates[name]

    def _basis_on(self, device: torch.device) -> Basis:
        found = self._bases.get(self.acting)
        if found is None or found.inputs.device != device:
            found = self._agenda.basis(self.acting).to(device, torch.float32)
            self._bases[self.acting] = found
        return found

    def forget(self) -> None:
        """Drop the tensors of the last call."""
        self.encodings = self.keys = self.inputs = self.gates = None


def _same(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
        return False
    return torch.equal(first, second)
