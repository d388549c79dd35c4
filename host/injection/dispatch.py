"""The way into a loaded model: one dispatcher per text projection.

ComfyUI shares one set of modules among all clones of a patcher, so nothing is ever replaced
for good. While a patcher that carries concepts is loaded, the `.forward` of every text projection
is a `Dispatcher`; its edits are keyed by patcher. The dispatcher calls the projection's original
forward, so LoRA, quantised and offloaded weights stay the projection's own business. The model's
own call has a `CallDispatcher` in the same way, so that whoever calls the model, with whatever
options, finds the edits ready.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from comfy.model_base import BaseModel
from torch import Tensor

Projection = Callable[[Tensor], Tensor]

_DISPATCHER = "_perfusion_dispatcher"
APPLY = "_apply_model"
CONDITIONS = "extra_conds"
"""What makes of a conditioning all that the model is called with, once before sampling."""


class Override(Protocol):
    """What a dispatcher does in place of its projection."""

    def apply(self, original: Projection, encodings: Tensor) -> Tensor:
        """The edited projection (B, N, d) of encodings (B, N, D)."""
        ...


class Dispatcher:
    """Stands in for a projection's `.forward`; plain callable, kept by the module for good.

    Without an edit it is the original forward. With edits of several owners at once (only when
    ComfyUI loads their patchers together) the one put last is in force.

    Attributes:
        original: the forward without edits; only while installed, as the module keeps its
            dispatcher and would keep itself alive through it.
        replaced: another pack's forward, which was there before.
    """

    def __init__(self) -> None:
        self.original: Projection = _not_installed
        self.replaced: Any = None
        self.installed = False
        self.edits: dict[int, Override] = {}
        self.active: Override | None = None

    def __call__(self, encodings: Tensor) -> Tensor:
        edit = self.active
        if edit is None:
            return self.original(encodings)
        return edit.apply(self.original, encodings)

    def put(self, owner: int, edit: Override) -> None:
        """Add or replace the edit of one owner; it becomes the one in force."""
        self.edits.pop(owner, None)
        self.edits[owner] = edit
        self.active = edit

    def drop(self, owner: int) -> None:
        """Remove the edit of one owner, if it has one."""
        self.edits.pop(owner, None)
        self.active = next(reversed(self.edits.values()), None)

    def rest(self) -> None:
        """Let go of the module until it is installed again."""
        self.installed = False
        self.original = _not_installed
        self.replaced = None


ModelCall = Callable[..., Any]
Around = Callable[..., Any]
"""Called with the model's own call, the model, and what the model is called with."""


class CallDispatcher:
    """Stands in for a method of a ComfyUI BaseModel while concepts are injected.

    Args:
        model: whose method it is.
        method: its name: `APPLY`, or `CONDITIONS`.
    """

    def __init__(self, model: BaseModel, method: str) -> None:
        self.replaced: ModelCall | None = model.__dict__.get(method)
        self.around: dict[int, Around] = {}
        self._model = model
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model
        own: ModelCall = getattr(type(model), self._method)
        original = self.replaced or functools.partial(own, model)
        around = next(reversed(self.around.values()), None)
        if around is None:
            return original(*args, **kwargs)
        return around(original, model, *args, **kwargs)


def install_call(model: BaseModel, owner: int, around: Around, method: str = APPLY) -> None:
    """Go around calls of a model's method from now on, in the name of one owner."""
    dispatcher = model.__dict__.get(method)
    if not isinstance(dispatcher, CallDispatcher):
        dispatcher = model.__dict__[method] = CallDispatcher(model, method)
    dispatcher.around.pop(owner, None)
    dispatcher.around[owner] = around


def uninstall_call(model: BaseModel, owner: int, method: str = APPLY) -> None:
    """Stop going around calls of a model's method in the name of this owner."""
    dispatcher = model.__dict__.get(method)
    # One that another pack laid something over stays, and passes through.
    if not isinstance(dispatcher, CallDispatcher):
        return
    dispatcher.around.pop(owner, None)
    if dispatcher.around:
        return
    if dispatcher.replaced is None:
        del model.__dict__[method]
    else:
        model.__dict__[method] = dispatcher.replaced


def install(module: Any) -> Dispatcher:
    """The dispatcher of a projection module, put in place of its forward."""
    dispatcher = module.__dict__.get(_DISPATCHER)
    current = module.__dict__.get("forward")
    if dispatcher is None:
        dispatcher = module.__dict__[_DISPATCHER] = Dispatcher()
    if dispatcher.installed and not _is_own_forward(module):
        # Still there: on top, or below a forward another pack laid over it.
        return dispatcher
    if current is dispatcher:
        # Put back by a pack that had found it there.
        del module.__dict__["forward"]
        current = None
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
        if dispatcher.replaced is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = dispatcher.replaced
        dispatcher.rest()
    elif _is_own_forward(module):
        dispatcher.rest()
    # Any other forward was laid over ours and is not ours to remove; ours passes through.


def _is_own_forward(module: Any) -> bool:
    """Whether nothing stands in for the forward of the module's class."""
    return getattr(module.forward, "__func__", None) is type(module).forward


def _not_installed(encodings: Tensor) -> Tensor:
    raise RuntimeError("a projection was called through a dispatcher that is not in it")
