"""What the projections of a model share during one model call."""

from __future__ import annotations

import torch
from torch import Tensor

from ...perfusion.gated.rank_one import Basis, gated_inputs
from .agenda import Acting, Agenda


class SharedInputs:
    """x' and the gates of the encoding at hand, for all layers in which the same concepts act.

    A model call hands one and the same tensor to all its layers; it is recognised by identity
    and, as other packs write into it, by its version. What a layer gets instead of it is edited
    for itself. `forget` ends that after each call.
    """

    def __init__(self, group: Acting, agenda: Agenda) -> None:
        self.group = group
        self.acting: Acting = group
        self._agenda = agenda
        self._bases: dict[Acting, Basis] = {}
        self.basis: Basis | None = None
        self.encodings: Tensor | None = None
        self.version: int | None = None
        self.keys: Tensor | None = None
        self.inputs: Tensor | None = None
        self.gates: Tensor | None = None

    def passes(self, encodings: Tensor) -> bool:
        """Whether these encodings are projected as if there were no concepts."""
        return not self.acting

    def of(self, encodings: Tensor) -> tuple[Tensor, Tensor]:
        """x' (B, N, D) and gates (B, N, k) of encodings (B, N, D), both in their dtype."""
        if self._at_hand(encodings) and self.inputs is not None and self.gates is not None:
            return self.inputs, self.gates
        if self.basis is None:
            self.basis = self._agenda.basis(self.acting)
        inputs, gates = gated_inputs(encodings, self.basis)
        return inputs, gates.to(encodings.dtype)

    def keys_of(self, encodings: Tensor) -> Tensor:
        """What the keys of the encodings at hand are made of: their twin.

        Raises:
            RuntimeError: for other encodings than those the model was called with.
        """
        if self.keys is None or not self._at_hand(encodings):
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

    def begin(self, encodings: Tensor, keys: Tensor, progress: float) -> None:
        """Make everything ready for one model call."""
        self.forget()
        if not self.acting:
            return
        basis = self._basis_on(encodings.device)
        moved = self._agenda.gates(self.acting, progress)
        self.basis = basis if moved is None else basis.with_gates(*moved)
        inputs, gates = gated_inputs(encodings, self.basis)
        self.encodings, self.version, self.keys = encodings, encodings_version(encodings), keys
        self.inputs, self.gates = inputs, gates.to(encodings.dtype)

    def forget(self) -> None:
        """Drop the tensors of the last call."""
        self.encodings = self.keys = self.inputs = self.gates = self.basis = None

    def _at_hand(self, encodings: Tensor) -> bool:
        if self.encodings is not encodings:
            return False
        # A compiler follows writes by itself, and would stop at the question.
        return torch.compiler.is_compiling() or encodings_version(encodings) == self.version

    def _basis_on(self, device: torch.device) -> Basis:
        found = self._bases.get(self.acting)
        if found is None or found.inputs.device != device:
            found = self._agenda.basis(self.acting).to(device, torch.float32)
            self._bases[self.acting] = found
        return found


def followed(encodings: Tensor) -> Tensor:
    """Encodings that count how often they are written to, as inference tensors do not."""
    if not encodings.is_inference():
        return encodings
    with torch.inference_mode(False), torch.no_grad():
        return encodings.clone()


def encodings_version(encodings: Tensor) -> int | None:
    """How often encodings were written to, None where that is not counted."""
    return None if encodings.is_inference() else encodings._version
