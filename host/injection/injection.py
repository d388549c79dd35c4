"""The concepts of a patcher inside the model it loads (see `dispatch` for the way in)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...perfusion.concept.concept import Concept
from ...perfusion.gated.rank_one import project
from ..interface.messages import warn
from ..models.families import cross_attentions, network_of
from ..models.networks import CrossAttention, FusedPart
from ..text.twin import told_apart, untwined
from .adapted import around_conditions
from .agenda import Agenda, clock_of
from .control import give_superclass_encodings
from .dispatch import (
    CONDITIONS,
    Dispatcher,
    ModelCall,
    Override,
    Projection,
    install,
    install_call,
    uninstall,
    uninstall_call,
)
from .fused import FusedProjection, module_of, share_of
from .hints import prompt_hints, schedule_hints
from .key_locks import KeyLock
from .second_call import names_a_concept, with_second
from .shared_inputs import SharedInputs, followed
from .twin_inputs import TwinInputs
from .two_models import SecondClone, calls_of_another, detach_watch, is_of

KEY = "perfusion"

_OUTER_SAMPLE = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
_SAMPLER_SAMPLE = comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE


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
        if self.shared.passes(encodings):
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
                keys = without_bias(original, self._superclasses.to(device, dtype)[None])[0]
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


def without_bias(original: Projection, encodings: Tensor) -> Tensor:
    """`W e` (B, N, d) of a projection that may add a bias, which is no part of a target output.

    The bias stays the projection's own: `h = W x' + b + g o`. Where there is none, what a zero is
    projected to is 0, and nothing changes.
    """
    return original(encodings) - original(torch.zeros_like(encodings[:1, :1]))


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

    def __init__(self, model: BaseModel, agenda: Agenda, key_lock: KeyLock) -> None:
        self.model_id = id(model)
        self.second = network_of(model).second
        self._agenda = agenda
        self._key_lock = key_lock
        shared = TwinInputs if key_lock == "twin" else SharedInputs
        self._groups = {group: shared(group, agenda) for group in agenda.groups.values()}
        self._edits: list[tuple[Dispatcher, Any, InjectedProjection]] = []
        self._hooked = False

    def add(self, owner: int, layer: CrossAttention, concepts: Sequence[Concept]) -> None:
        """Put the edit of one cross-attention in place."""
        group = self._agenda.groups[layer.name]
        if not group:
            return
        shared = self._groups[group]
        chosen = [concepts[at] for at in group]
        superclasses = torch.stack([concept.superclass_encoding for concept in chosen])
        values = [concept.o_v[layer.name] for concept in chosen]
        keys: Override | None = None
        if self._key_lock == "global":
            keys = TwinKeys(shared)
        elif self._key_lock == "local":
            outputs = [None if c.o_k is None else c.o_k[layer.name] for c in chosen]
            keys = InjectedProjection(shared, outputs, superclasses)
        edits = (layer.to_k, keys), (layer.to_v, InjectedProjection(shared, values, superclasses))
        self._put(owner, edits)

    def begin(
        self, encodings: Tensor, keys: Tensor, moment: tuple[set[int], float] | None, hooked: bool
    ) -> None:
        """Make everything ready for a model call, outside of a compiled region.

        Args:
            encodings: (B, N, D) of the prompts; the layers will get them but under twin lock.
            keys: (B, N, D) of their twin, which global key lock makes keys of.
            moment: the concepts that act and how far the sampling is; None without schedules.
            hooked: whether hooks of conditionings patch other weights in.
        """
        acting, progress = (None, 0.0) if moment is None else moment
        changed = [group for group in self._groups.values() if group.act(acting)]
        for dispatcher, part, edit in self._edits:
            if not edit.shared.acting:
                continue
            # The locked keys are made with the weights.
            if edit.outputs is None or hooked or self._hooked:
                original = share_of(dispatcher.original, part)
                edit.prepare(original, encodings.device, encodings.dtype)
            elif edit.shared in changed:
                edit.choose()
        self._hooked = hooked
        for group in self._groups.values():
            group.begin(encodings, keys, progress)

    def stand_by(self, moment: tuple[set[int], float] | None) -> None:
        """Under twin lock, before a call whose prompts name no concept: nothing to compute."""
        acting, progress = (None, 0.0) if moment is None else moment
        changed = [group for group in self._groups.values() if group.act(acting)]
        for *_, edit in self._edits:
            if edit.shared in changed:
                edit.outputs = None
        for group in self._groups.values():
            if isinstance(group, TwinInputs):
                group.stand_by(progress)

    def rest(self) -> None:
        """Before a call for another clone of the model, in which nothing acts."""
        for group in self._groups.values():
            group.act(set())

    def forget(self) -> None:
        """Drop the tensors of the last call."""
        for group in self._groups.values():
            group.forget()

    def _put(self, owner: int, edits: Sequence[tuple[Any, Override | None]]) -> None:
        """Put the edits of one layer's projections in place, None for none."""
        fused = FusedProjection()
        for part, edit in edits:
            if isinstance(part, FusedPart):
                fused.put(part, edit)
            override = fused if isinstance(part, FusedPart) else edit
            if override is None:
                continue
            dispatcher = install(module_of(part))
            dispatcher.put(owner, override)
            if isinstance(edit, InjectedProjection):
                self._edits.append((dispatcher, part, edit))


class ConceptInjection:
    """Injects the concepts of one patcher, and of its clones, into whatever model they load.

    Modules are looked up in the patcher handed in, never closed over: clones for other devices
    have modules of their own. Concept tensors stay in plain objects, for the patcher would cast
    anything that has a `.to`.
    """

    def __init__(self, agenda: Agenda, key_lock: KeyLock) -> None:
        self.concepts = agenda.concepts
        self._agenda = agenda
        self._key_lock: KeyLock = key_lock
        self._live: dict[int, InjectedModel] = {}
        self._acted: set[int] = set()
        self._level: tuple[weakref.ref[Tensor], float] | None = None
        self._not_ours: frozenset[Any] = frozenset()
        words = ", ".join(concept.placeholder for concept in agenda.concepts)
        self.second_clone = SecondClone(words)

    def inject(self, patcher: ModelPatcher) -> None:
        """Put the edit into the patcher's model. May be called again without an eject."""
        self.eject(patcher)
        model: Any = patcher.model
        edit = InjectedModel(model, self._agenda, self._key_lock)
        for layer in cross_attentions(model):
            edit.add(id(patcher), layer, self.concepts)
        self._live[id(patcher)] = edit
        install_call(model, id(patcher), functools.partial(self.around_call, edit))
        if network_of(model).adapts:
            install_call(model, id(patcher), around_conditions, CONDITIONS)

    def eject(self, patcher: ModelPatcher) -> None:
        """Take the patcher's edit out of its model again, if it is there."""
        model: Any = patcher.model
        uninstall_call(model, id(patcher))
        uninstall_call(model, id(patcher), CONDITIONS)
        for layer in cross_attentions(model):
            for module in layer.modules:
                uninstall(module, id(patcher))
        self._live.pop(id(patcher), None)

    def around_call(
        self,
        edit: InjectedModel,
        original: ModelCall,
        model: BaseModel,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Around each model call: everything ready before it, no tensor of it kept after it."""
        options = {} if transformer_options is None else transformer_options
        if is_of(self._not_ours, options):
            edit.rest()
            return original(x, t, c_concat, c_crossattn, control, options, **kwargs)
        moment = self._moment(model, options.get("sigmas", t))
        twin_lock = self._key_lock == "twin"
        if twin_lock and not names_a_concept(edit.second, c_crossattn, kwargs):
            context = c_crossattn
            edit.stand_by(moment)
        elif c_crossattn is None:
            raise ValueError("the model is sampled with concepts but without a prompt")
        else:

            def cast(each: Tensor) -> Tensor:
                dtype = model.get_dtype_inference()
                return comfy.model_management.cast_to_device(each, x.device, dtype)

            encodings, twin = (cast(each) for each in untwined(c_crossattn))
            if twin_lock:
                context = twin = followed(twin)
            else:
                context = encodings = followed(encodings)
            if edit.second is not None:
                pair, kwargs = with_second(edit.second, (encodings, twin), kwargs, cast)
                encodings, twin = pair
            hooked = getattr(model.current_patcher, "current_hooks", None) is not None
            edit.begin(encodings, twin, moment, hooked)
        try:
            with told_apart():
                return original(x, t, c_concat, context, control, options, **kwargs)
        finally:
            edit.forget()

    def wrap_outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around each sampling run: what its conditionings lack is seen before it begins."""
        conds = getattr(executor.class_obj, "conds", None) or {}
        conditionings = [each for entries in conds.values() if entries for each in entries]
        give_superclass_encodings(conditionings)
        hints = prompt_hints(self.concepts, conditionings, self._key_lock)
        if hints:
            warn("\n".join(hints))
        self._acted = set() if self._agenda.scheduled else set(range(len(self.concepts)))
        self._not_ours = calls_of_another(executor.class_obj, KEY)
        try:
            with self.second_clone.first_now():
                result = executor(*args, **kwargs)
        finally:
            self._not_ours = frozenset()
        hints += schedule_hints(self.concepts, self._acted)
        if len(self._acted) < len(self.concepts):
            warn("\n".join(hints))
        return result

    def wrap_sampler(self, executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a run's sampler, when the model is loaded: the edit must be in it by now."""
        model = getattr(guider, "inner_model", None)
        if model is not None and id(model) not in {each.model_id for each in self._live.values()}:
            raise RuntimeError(
                "the model is sampled with concepts applied but their edit is not in it; another "
                "node removed the injection of this model, connect Apply Concepts after that node"
            )
        return executor(guider, *args, **kwargs)

    def _moment(self, model: BaseModel, noise: Tensor) -> tuple[set[int], float] | None:
        if not self._agenda.scheduled:
            return None
        # One tensor comes with all calls of a step; reading it makes the host wait for the device.
        if self._level is None or self._level[0]() is not noise:
            self._level = weakref.ref(noise), float(noise.flatten()[0])
        clock = clock_of(model.model_sampling)
        level = self._level[1]
        acting = clock.acting(self.concepts, level)
        self._acted |= acting
        return acting, clock.progress(level)


def set_injection(patcher: ModelPatcher, injection: ConceptInjection | None) -> None:
    """Give a patcher this one injection (None: none), replacing the one it has."""
    patcher.remove_wrappers_with_key(_OUTER_SAMPLE, KEY)
    patcher.remove_wrappers_with_key(_SAMPLER_SAMPLE, KEY)
    patcher.remove_injections(KEY)
    detach_watch(patcher, KEY)
    if injection is None:
        return
    patcher.set_injections(
        KEY,
        [comfy.patcher_extension.PatcherInjection(injection.inject, injection.eject)],
    )
    patcher.add_wrapper_with_key(_OUTER_SAMPLE, KEY, injection.wrap_outer_sample)
    patcher.add_wrapper_with_key(_SAMPLER_SAMPLE, KEY, injection.wrap_sampler)
    injection.second_clone.watch(patcher, KEY)
