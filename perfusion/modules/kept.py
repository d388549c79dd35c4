"""Values computed from tensors, kept until one of the tensors is replaced or written to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """One such value.

    The tensors are told by identity and by torch's own count of writes to them; the value lives
    no longer than they do. Writes through ``.data`` are not counted by torch: call `drop`.
    Tensors of inference mode have no count, so nothing is kept for them. Copies start empty.
    """

    _value: T | None = None
    _state: tuple[Hashable, ...] | None = None
    _sources: tuple[weakref.ref[Tensor], ...] = ()

    def get(self, sources: Sequence[Tensor], compute: Callable[[], T], key: Hashable = None) -> T:
        """The value of ``compute()`` for these tensors and this ``key``."""
        if any(source.is_inference() for source in sources):
            return compute()
        # What inference mode makes cannot be used in training, nor is it made there again.
        versions = [(source._version, source.dtype, source.device) for source in sources]
        state = (key, torch.is_inference_mode_enabled(), *versions)
        if self._state == state and all(
            kept() is source for kept, source in zip(self._sources, sources, strict=True)
        ):
            return self._value  # type: ignore[return-value]
        self.drop()
        value = compute()
        this = weakref.ref(self)

        def forget(gone: weakref.ref[Tensor]) -> None:
            owner = this()
            if owner is not None and any(gone is source for source in owner._sources):
                owner.drop()

        self._value, self._state = value, state
        self._sources = tuple(weakref.ref(source, forget) for source in sources)
        return value

    def drop(self) -> None:
        """Forget the value."""
        self._value, self._state, self._sources = None, None, ()

    def __getstate__(self) -> dict[str, object]:
        return {}
