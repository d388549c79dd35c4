"""Two clones of one model under one guider (ComfyUI's Dual Model CFG Guider).

ComfyUI keeps one clone of a model loaded at a time, the guider's first one, and calls it for both.
Which prompts are the second clone's is known from the guider; a second clone that would need
concepts of its own has lost them by then, which is said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

from ..interface.messages import warn


def calls_of_another(guider: Any, key: str) -> frozenset[Any]:
    """The ids of the prompts that a guider shows to a clone without the first one's concepts.

    Args:
        guider: any of ComfyUI's.
        key: of the attachment that holds a clone's concepts.
    """
    first = getattr(guider, "model_patcher", None)
    second = getattr(guider, "uncond_model_patcher", None)
    if first is None or second is None or second.model is not first.model:
        return frozenset()
    if second.get_attachment(key) is first.get_attachment(key):
        return frozenset()
    negative = (getattr(guider, "conds", None) or {}).get("negative") or ()
    return frozenset(each["uuid"] for each in negative)


def is_of(calls: frozenset[Any], options: Mapping[str, Any]) -> bool:
    """Whether a model call, with these options, is one of those."""
    return bool(calls) and not calls.isdisjoint(options.get("uuids") or ())


class SecondClone:
    """Notices that a clone with concepts is made ready and then unloaded before it is used."""

    def __init__(self, placeholders: str) -> None:
        self._placeholders = placeholders
        self._ready: set[int] = set()
        self._first = False

    def watch(self, patcher: ModelPatcher, key: str) -> None:
        """Watch what becomes of a patcher and its clones."""
        patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, key, self._on_pre_run)
        patcher.add_callback_with_key(CallbacksMP.ON_DETACH, key, self._on_detach)
        patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, key, self._on_cleanup)

    @contextlib.contextmanager
    def first_now(self) -> Iterator[None]:
        """While a clone with these concepts is the guider's first one."""
        before, self._first = self._first, True
        try:
            yield
        finally:
            self._first = before

    def _on_pre_run(self, patcher: ModelPatcher) -> None:
        if not self._first:
            self._ready.add(id(patcher))

    def _on_detach(self, patcher: ModelPatcher, unpatch_all: bool) -> None:
        if id(patcher) in self._ready:
            warn(
                f"{self._placeholders}: without effect on this guider's negative model, as that is "
                "the same model as the positive one and ComfyUI loads only one of its versions; "
                "load the checkpoint a second time for it, or apply the concepts to both"
            )

    def _on_cleanup(self, patcher: ModelPatcher) -> None:
        self._ready.discard(id(patcher))


def detach_watch(patcher: ModelPatcher, key: str) -> None:
    """Stop watching a patcher."""
    for call in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_DETACH, CallbacksMP.ON_CLEANUP):
        patcher.remove_callbacks_with_key(call, key)
