"""The concepts of a patcher inside the model it loads (see `dispatch` for the way in)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from torch import Tensor

from ...perfusion.concept.concept import Concept
from ...perfusion.gated.rank_one import project
from ..models.families import cross_attentions
from ..text.twin import untwined
from .agenda import Acting, Agenda, Clock
from .dispatch import Dispatcher, Projection, install, uninstall
from .encoding_cache import RunCache, SharedInputs
from .hints import Hints

KEY = "perfusion"

_APPLY_MODEL = comfy.patcher_extension.WrappersMP.APPLY_MODEL
_OUTER_SAMPLE = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE


class InjectedProjection:
    """The concepts in one projection: one target output per concept that may act there.

    `targets` holds each concept's output (d,), or None where it is what the projection itself
    makes of the concept's superclass encoding in `superclasses` (k, D): local key lock. Those are
    computed at first use, when the weights are as they will be used, LoRA included.
    """

    def __init__(
        self, shared: SharedInputs, targets: Sequence[Tensor | None], superclasses: Tensor
    ) -> None:
        self.shared = shared
        self.outputs: Tensor | None = None
        self._all: Tensor | None = None
        self._targets = targets
        self._superclasses = superclasses

    def apply(self, original: Projection, encodings: Tensor) -> Tensor:
        """`W x' + g o`: the projection's own forward and one rank-k update."""
        if not self.shared.acting:
            return original(encodings)
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
            self._all = torch.stack([row for row in rows if row is not None])
        return self.choose()

    def choose(self) -> Tensor:
        """Keep the outputs of the concepts that act now; `prepare` comes first."""
        assert self._all is not None
        group, acting = self.shared.group, self.shared.acting
        whole = acting == group
        self.outputs = self._all if whole else self._all[[group.index(at) for at in acting]]
        return self.outputs


class TwinKeys:
    """The key projection under global key lock: unedited, of the prompt's twin."""

    def __init__(self, shared: SharedInputs) -> None:
        self.shared = shared

    def apply(self, original: Projection, encodings: Tensor) -> Tensor:
        """`W e_twin`: nothing but the projection's own forward."""
        if not self.shared.acting:
            return original(encodings)
        return original(self.shared.keys_of(encodings))


class InjectedModel:
    """The edit of one injected model: its shared inputs and all its projections."""

    def __init__(self, model: Any, agenda: Agenda) -> None:
        self.model_id = id(model)
        self.cache = RunCache()
        self._agenda = agenda
        self._groups = {group: SharedInputs(group, agenda) for group in agenda.groups.values()}
        self._edits: list[tuple[Dispatcher, InjectedProjection]] = []
        self._clock: tuple[Any, Clock] | None = None
        self._hooked = False

    def add(self, owner: int, layer: Any, concepts: Sequence[Concept], twin_keys: bool) -> None:
        """Put the edit of one cross-attention in place."""
        group = self._agenda.groups[layer.name]
        if not group:
            return
        shared = self._groups[group]
        chosen = [concepts[at] for at in group]
        superclasses = torch.stack([concept.superclass_encoding for concept in chosen])
        keys = [None if c.o_k is None else c.o_k[layer.name] for c in chosen]
        values = [concept.o_v[layer.name] for concept in chosen]
        if twin_keys:
            install(layer.to_k).put(owner, TwinKeys(shared))
        else:
            self._put(owner, layer.to_k, InjectedProjection(shared, keys, superclasses))
        self._put(owner, layer.to_v, InjectedProjection(shared, values, superclasses))

    def begin(
        self, model: Any, sigma: Tensor, name: Any, encodings: Tensor, keys: Tensor
    ) -> Tensor:
        """Make everything ready outside of a compiled region.

        Returns the encodings to call the model with.
        """
        acting, progress = None, 0.0
        if self._agenda.scheduled:
            clock, level = self._clock_of(model), float(sigma.flatten()[0])
            acting = clock.acting(self._agenda.concepts, level)
            progress = clock.progress(level)
        changed = [group for group in self._groups.values() if group.act(acting)]
        # Hooks of conditionings patch other weights in, and the locked keys are made with them.
        hooked = getattr(model.current_patcher, "current_hooks", None) is not None
        for dispatcher, edit in self._edits:
            if not edit.shared.acting:
                continue
            if edit.outputs is None or hooked or self._hooked:
                edit.prepare(dispatcher.original, encodings.device, encodings.dtype)
            elif edit.shared in changed:
                edit.choose()
        self._hooked = hooked
        entry = self.cache.entry(name, encodings, keys)
        for group in self._groups.values():
            group.begin(entry, progress)
        return entry.encodings

    def acting(self) -> dict[Acting, Tensor]:
        """The gates (B, N, k) of the call at hand, by the concepts that act."""
        groups = [group for group in self._groups.values() if group.gates is not None]
        return {group.acting: group.gates for group in groups if group.gates is not None}

    def forget(self) -> None:
        """Drop the tensors of the last call."""
        for group in self._groups.values():
            group.forget()

    def _put(self, owner: int, module: Any, edit: InjectedProjection) -> None:
        dispatcher = install(module)
        dispatcher.put(owner, edit)
        self._edits.append((dispatcher, edit))

    def _clock_of(self, model: Any) -> Clock:
        # Nodes such as ModelSamplingDiscrete put another noise schedule into the same model.
        if self._clock is None or self._clock[0] is not model.model_sampling:
            self._clock = model.model_sampling, Clock(model.model_sampling)
        return self._clock[1]


class ConceptInjection:
    """Injects the concepts of one patcher, and of its clones, into whatever model they load.

    Modules are looked up in the patcher handed in, never closed over: clones for other devices
    have modules of their own. Concept tensors stay in plain objects, for the patcher would cast
    anything that has a `.to`.
    """

    def __init__(self, agenda: Agenda, global_lock: bool = False) -> None:
        self.concepts = agenda.concepts
        self._agenda = agenda
        self._global_lock = global_lock
        self._hints = Hints(agenda.concepts, global_lock)
        self._live: dict[int, InjectedModel] = {}

    def inject(self, patcher: Any) -> None:
        """Put the edit into the patcher's model. May be called again without an eject."""
        self.eject(patcher)
        edit = InjectedModel(patcher.model, self._agenda)
        for layer in cross_attentions(patcher.model):
            edit.add(id(patcher), layer, self.concepts, self._global_lock)
        self._live[id(patcher)] = edit

    def eject(self, patcher: Any) -> None:
        """Take the patcher's edit out of its model again, if it is there."""
        for layer in cross_attentions(patcher.model):
            uninstall(layer.to_k, id(patcher))
            uninstall(layer.to_v, id(patcher))
        self._live.pop(id(patcher), None)

    def wrap_apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Around each model call: outputs ready before it, no tensor of it kept after it."""
        model = executor.class_obj
        edits = [edit for edit in self._live.values() if edit.model_id == id(model)]
        if not edits:
            raise RuntimeError(
                "the model is sampled with concepts applied but their edit is not in it; another "
                "node removed the injection of this model, connect Apply Concepts after that node"
            )
        if c_crossattn is None:
            raise ValueError("the model is sampled with concepts but without a prompt")
        options = {} if transformer_options is None else transformer_options
        names = options.get("uuids")
        encodings, keys = (
            comfy.model_management.cast_to_device(each, x.device, model.get_dtype_inference())
            for each in untwined(c_crossattn)
        )
        for edit in edits:
            name = None if names is None else tuple(names)
            encodings = edit.begin(model, t, name, encodings, keys)
            self._hints.watch(edit.acting(), keys is not encodings)
        try:
            return executor(x, t, c_concat, encodings, control, options, **kwargs)
        finally:
            for edit in edits:
                edit.forget()

    def wrap_outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around each sampling run: nothing that belongs to it outlives it."""
        try:
            result = executor(*args, **kwargs)
            self._hints.give()
            return result
        finally:
            self._hints.clear()
            for edit in self._live.values():
                edit.cache.clear()


def set_injection(patcher: Any, injection: ConceptInjection | None) -> None:
    """Give a patcher this one injection (None: none), replacing the one it has."""
    patcher.remove_wrappers_with_key(_APPLY_MODEL, KEY)
    patcher.remove_wrappers_with_key(_OUTER_SAMPLE, KEY)
    patcher.remove_injections(KEY)
    if injection is None:
        return
    patcher.set_injections(
        KEY,
        [comfy.patcher_extension.PatcherInjection(injection.inject, injection.eject)],
    )
    patcher.add_wrapper_with_key(_APPLY_MODEL, KEY, injection.wrap_apply_model)
    patcher.add_wrapper_with_key(_OUTER_SAMPLE, KEY, injection.wrap_outer_sample)
