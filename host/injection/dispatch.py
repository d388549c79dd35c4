"""The way into a loaded model: one dispatcher per text projection.

ComfyUI shares one set of modules among all clones of a patcher, so nothing is ever replaced
for good. While a patcher that carries concepts is loaded, the `.forward` of every text projection
is a `Dispatcher`; its edits are keyed by patcher. The dispatcher calls the projection's original
forward, so LoRA, quantised and offloaded weights stay the projection's own business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

Projection = Callable[[Tensor], Tensor]

_DISPATCHER = "_perfusion_dispatcher"


class Override(Protocol):
    """What a dispatcher does in place of its projection."""

    def apply(self, original: Projection, encodings: Tensor) -> Tensor:
        """The edited projection (B, N, d) of encodings (B, N, D)."""
        ...


class Dispatcher:
    """Stands in for a projection's `.forward`; plain callable, kept by the module for good.

    Without an edit it is the original forward. With edits of several owners at once (only when
    ComfyUI loads their patchers together) the one put last is in force.
    """

    def __init__(self, module: Any) -> None:
        self.original: Projection = module.forward
        self.replaced: Any = module.__dict__.get("forward")
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
