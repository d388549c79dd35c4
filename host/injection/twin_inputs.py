"""What the value projections of a model share during one model call under twin lock."""

from __future__ import annotations

from torch import Tensor

from ...perfusion.gated.rank_one import Basis
from ...perfusion.gated.twin_lock import (
    as_tokens_of,
    named_tokens,
    open_twin_gates,
    twin_inputs,
    twin_similarities,
)
from ..text.twin import TwinEncoding, untwined
from .agenda import Acting, Agenda
from .shared_inputs import SharedInputs, encodings_version


class TwinInputs(SharedInputs):
    """`(1 - sum a) t` and a of the prompts at hand, for all layers in which the same concepts act.

    The gates come from the encodings that the model's conditioning t carries. What a layer gets
    instead of t is gated token by token with the same a, or by what it carries itself.
    """

    def __init__(self, group: Acting, agenda: Agenda) -> None:
        super().__init__(group, agenda)
        self._progress = 0.0
        # In the precision they are computed in, for what other nodes put in t's place.
        self._exact: Tensor | None = None

    def passes(self, encodings: Tensor) -> bool:
        """Whether these encodings are projected as if there were no concepts."""
        if not self.acting:
            return True
        return self.gates is None and not isinstance(encodings, TwinEncoding)

    def of(self, encodings: Tensor) -> tuple[Tensor, Tensor]:
        """`(1 - sum a) c` (B, N, D) and a (B, N, k) for what a layer gets, c (B, N, D).

        Raises:
            RuntimeError: for other tokens than those of the prompt, whose gates nothing tells.
        """
        if isinstance(encodings, TwinEncoding):
            prompt, twin = untwined(encodings)
            gates = self._gates_of(prompt, twin)
            return twin_inputs(twin, gates), gates
        if self._at_hand(encodings) and self.inputs is not None and self.gates is not None:
            return self.inputs, self.gates
        exact = None if self._exact is None else as_tokens_of(encodings, self._exact)
        if exact is None or encodings.shape[:-1] != exact.shape[:-1]:
            found = tuple(encodings.shape[:-1])
            expected = None if exact is None else tuple(exact.shape[:-1])
            raise RuntimeError(
                "twin lock needs the tokens of the prompt as they were encoded, and another node "
                "puts others in their place inside the model (an attn2_patch, as regional "
                f"prompting packs use): expected prompts and tokens {expected}, found {found}; "
                "leave that node out, or write its prompts with ComfyUI's own conditioning nodes"
            )
        return twin_inputs(encodings, exact), exact

    def begin(self, encodings: Tensor, keys: Tensor, progress: float) -> None:
        """Make everything ready for one model call.

        Args:
            encodings: the prompts (B, N, D), with placeholders.
            keys: their twin (B, N, D), which the layers will get.
            progress: how far the sampling is.
        """
        self.stand_by(progress)
        if not self.acting:
            return
        gates = self._gates_of(encodings, keys)
        self.encodings, self.version = keys, encodings_version(keys)
        self.inputs, self.gates = twin_inputs(keys, gates), gates.to(keys.dtype)
        self._exact = gates

    def stand_by(self, progress: float) -> None:
        """Before a model call whose prompts name no concept."""
        self.forget()
        self._progress = progress

    def forget(self) -> None:
        """Drop the tensors of the last call."""
        super().forget()
        self._exact = None

    def _gates_of(self, prompt: Tensor, twin: Tensor) -> Tensor:
        if self.basis is None:
            self.basis = self._moved(self._basis_on(prompt.device))
        similarity = twin_similarities(prompt, twin, self.basis)
        return open_twin_gates(similarity, named_tokens(prompt, twin), self.basis)

    def _moved(self, basis: Basis) -> Basis:
        moved = self._agenda.gates(self.acting, self._progress)
        return basis if moved is None else basis.with_gates(*moved)
