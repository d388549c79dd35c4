"""The edit inside a loaded model: one dispatcher per text projection.

ComfyUI shares one set of modules among all clones of a patcher, so nothing is ever replaced
for good. While a patcher that carries concepts is loaded, the `.forward` of every text projection
is a `Dispatcher`; its edits are keyed by patcher. The dispatcher calls the projection's original
forward, so LoRA, quantised and offloaded weights stay the projection's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import comfy.patcher_extension
import torch
from torch import Tensor

from ..perfusion.concept import Concept
from ..perfusion.rank_one import Basis, combine, gated_inputs, project
from .families import cross_attentions

KEY = "perfusion"

Projection = Callable[[Tensor], Tensor]

_DISPATCHER = "_perfusion_dispatcher"
_APPLY_MODEL = comfy.patcher_extension.WrappersMP.APPLY_MODEL


class SharedInputs:
    """x' and the gates of the encoding at hand, computed once and shared by all projections.

    A model call hands one and the same tensor to all its layers; it is recognised by identity
    and held, so its memory cannot be reused meanwhile. `forget` ends that after each call.
    """

    def __init__(self, basis: Basis) -> None:
        self.basis = basis
        self.encodings: Tensor | None = None
        self.inputs: Tensor | None = None
        self.gates: Tensor | None = None

    def of(self, encodings: Tensor) -> tuple[Tensor, Tensor]:
        """x' (B, N, D) and gates (B, N, k) of encodings (B, N, D), both in their dtype."""
        if self.encodings is not encodings or self.inputs is None or self.gates is None:
            self.inputs, gates = gated_inputs(encodings, self.basis)
            self.gates = gates.to(encodings.dtype)
            self.encodings = encodings
        return self.inputs, self.gates

    def forget(self) -> None:
        """Drop the tensors of the last call."""
        self.encodings = self.inputs = self.gates = None


class Edit(Protocol):
    """What a dispatcher does in place of its projection."""

    def apply(self, original: Projection, encodings: Tensor) -> Tensor:
        """The edited projection (B, N, d) of encodings (B, N, D)."""
        ...


class ConceptEdit:
    """The concepts in one projection: one target output per concept.

    `targets` holds each concept's output (d,), or None where it is what the projection itself
    makes of the concept's superclass encoding in `superclasses` (k, D): local key lock. Those are
    computed at first use, when the weights are as they will be used, LoRA included.
    """

    def __init__(
        self, shared: SharedInputs, targets: Sequence[Tensor | None], superclasses: Tensor
    ) -> None:
        self.shared = shared
        self.outputs: Tensor | None = None
        self._targets = targets
        self._superclasses = superclasses

    def apply(self, original: Projection, encodings: Tensor) -> Tensor:
        """`W x' + g o`: the projection's own forward and one rank-k update."""
        outputs = self.outputs
        if outputs is None:
            outputs = self.prepare(original, encodings.device, encodings.dtype)
        inputs, gates = self.shared.of(encodings)
        return project(original, inputs, gates, outputs)

    def prepare(self, original: Projection, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The outputs (k, d) on the device and in the dtype of the layer."""
        # Made as ordinary tensors: a model may also be trained while concepts are applied.
        with torch.inference_mode(False), torch.no_grad():
            rows = [None if row is None else row.to(device, dtype) for row in self._targets]
            if any(row is None for row in rows):
                keys = original(self._superclasses.to(device, dtype)[None])[0]
                rows = [key if row is None else row for row, key in zip(rows, keys, strict=True)]
            outputs = torch.stack([row for row in rows if row is not None])
        self.outputs = outputs
        return outputs


class Dispatcher:
    """Stands in for a projection's `.forward`; plain callable, kept by the module for good.

    Without an edit it is the original forward. With edits of several owners at once (only when
    ComfyUI loads their patchers together) the one put last is in force.
    """

    def __init__(self, module: Any) -> None:
        self.original: Projection = module.forward
        self.replaced: Any = module.__dict__.get("forward")
        self.installed = False
        self.edits: dict[int, Edit] = {}
        self.active: Edit | None = None

    def __call__(self, encodings: Tensor) -> Tensor:
        edit = self.active
        if edit is None:
            return self.original(encodings)
        return edit.apply(self.original, encodings)

    def put(self, owner: int, edit: Edit) -> None:
        """Add or replace the edit of one owner; it becomes the one in force."""
        self.edits.pop(owner, None)
        self.edits[owner] = edit
        self.active = edit

    def drop(self, owner: int) -> None:
        """Remove the edit of one owner, if it has one."""
        self.edits.pop(owner, None)
        self.active = next(reversed(self.edits.values()), None)


def install(module: Any) -> Dispatcher:
    """The dispatcher of a projection module, put in place of its forward."""
    dispatcher = module.__dict__.get(_DISPATCHER)
    current = module.__dict__.get("forward")
    if dispatcher is None:
        dispatcher = module.__dict__[_DISPATCHER] = Dispatcher(module)
    elif dispatcher.installed and not _is_own_forward(module):
        # Still there: on top, or below a forward another pack laid over it.
        return dispatcher
    else:
        # Someone else's forward may have come or gone since.
        dispatcher.original = module.forward
        dispatcher.replaced = current
    dispatcher.installed = True
    module.__dict__["forward"] = dispatcher
    return dispatcher


def uninstall(module: Any, owner: int) -> None:
    """Drop an owner's edit and, when it was the last, give the module its forward back."""
    dispatcher = module.__dict__.get(_DISPATCHER)
    if dispatcher is None:
        return
    dispatcher.drop(owner)
    if dispatcher.edits:
        return
    if module.__dict__.get("forward") is dispatcher:
        dispatcher.installed = False
        if dispatcher.replaced is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = dispatcher.replaced
    elif _is_own_forward(module):
        dispatcher.installed = False
    # Any other forward was laid over ours and is not ours to remove; ours passes through.


def _is_own_forward(module: Any) -> bool:
    """Whether nothing stands in for the forward of the module's class."""
    return getattr(module.forward, "__func__", None) is type(module).forward


class _ModelEdit:
    """The edit of one injected model: its shared inputs and all its projections."""

    def __init__(self, model: Any, shared: SharedInputs) -> None:
        self.model_id = id(model)
        self.shared = shared
        self.projections: list[tuple[Dispatcher, ConceptEdit]] = []

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make everything ready outside of a compiled region."""
        self.shared.forget()
        for dispatcher, edit in self.projections:
            if edit.outputs is None:
                edit.prepare(dispatcher.original, device, dtype)
        if self.shared.basis.inputs.device != device:
            self.shared.basis = self.shared.basis.to(device, torch.float32)


class ConceptInjection:
    """Injects the concepts of one patcher, and of its clones, into whatever model they load.

    Modules are looked up in the patcher handed in, never closed over: clones for other devices
    have modules of their own. Concept tensors stay in plain objects, for the patcher would cast
    anything that has a `.to`.
    """

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self.concepts = tuple(concepts)
        basis = combine([concept.direction() for concept in self.concepts])
        self._basis = basis.to(torch.device("cpu"), torch.float32)
        self._live: dict[int, _ModelEdit] = {}

    def inject(self, patcher: Any) -> None:
        """Put the edit into the patcher's model. May be called again without an eject."""
        self.eject(patcher)
        shared = SharedInputs(self._basis)
        edit = _ModelEdit(patcher.model, shared)
        superclasses = torch.stack([concept.superclass_encoding for concept in self.concepts])
        for layer in cross_attentions(patcher.model):
            keys = [None if c.o_k is None else c.o_k[layer.name] for c in self.concepts]
            values = [concept.o_v[layer.name] for concept in self.concepts]
            for module, targets in ((layer.to_k, keys), (layer.to_v, values)):
                dispatcher = install(module)
                projection = ConceptEdit(shared, targets, superclasses)
                dispatcher.put(id(patcher), projection)
                edit.projections.append((dispatcher, projection))
        self._live[id(patcher)] = edit

    def eject(self, patcher: Any) -> None:
        """Take the patcher's edit out of its model again, if it is there."""
        for layer in cross_attentions(patcher.model):
            uninstall(layer.to_k, id(patcher))
            uninstall(layer.to_v, id(patcher))
        self._live.pop(id(patcher), None)

    def wrap_apply_model(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around each model call: outputs ready before it, no tensor of it kept after it."""
        model = executor.class_obj
        edits = [edit for edit in self._live.values() if edit.model_id == id(model)]
        if not edits:
            raise RuntimeError(
                "the model is sampled with concepts applied but their edit is not in it; another "
                "node removed the injection of this model, connect Apply Concepts after that node"
            )
        for edit in edits:
            edit.prepare(x.device, model.get_dtype_inference())
        try:
            return executor(x, *args, **kwargs)
        finally:
            for edit in edits:
                edit.shared.forget()


def set_injection(patcher: Any, injection: ConceptInjection | None) -> None:
    """Give a patcher this one injection (None: none), replacing the one it has."""
    patcher.remove_wrappers_with_key(_APPLY_MODEL, KEY)
    patcher.remove_injections(KEY)
    if injection is None:
        return
    patcher.set_injections(
        KEY,
        [comfy.patcher_extension.PatcherInjection(injection.inject, injection.eject)],
    )
    patcher.add_wrapper_with_key(_APPLY_MODEL, KEY, injection.wrap_apply_model)
