"""Two encodings of one prompt that go through a graph as one tensor.

Every prompt with a placeholder is encoded twice: with the concepts' vectors, and with their
superclass words at the same positions, its *twin*. Which comes first depends on the key lock: under
twin lock it is the twin, otherwise the prompt itself. The other one travels inside the first as a
`TwinEncoding`, a tensor that carries another: whatever a graph does to a conditioning token by
token (concatenate, average, scale, cut, move, batch) it does to both, so every stock conditioning
node keeps them together. Anything else sees the first encoding only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..interface.messages import warn

# Functions that treat every token alike or move whole tokens, under the name they have both in
# torch and on tensors.
_NAMES = """
add add_ sub sub_ rsub mul mul_ div div_ true_divide neg lerp lerp_ where addcmul addcdiv
__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__
__itruediv__ __neg__ clamp clamp_ clip clip_ clamp_min clamp_max nan_to_num round abs sign sqrt
square pow __pow__ exp tanh sigmoid maximum minimum masked_fill masked_fill_ copy_ fill_ zero_
cat concat concatenate stack hstack vstack __getitem__ __setitem__ narrow index_select select
split chunk tensor_split unbind gather take_along_dim roll flip fliplr flipud repeat expand
expand_as broadcast_to tile repeat_interleave view view_as reshape unsqueeze squeeze flatten
unflatten transpose permute movedim moveaxis swapaxes swapdims t adjoint contiguous to cpu cuda
type float half bfloat16 double clone detach detach_ __deepcopy__ zeros_like ones_like empty_like
full_like pad
"""
_TOKENWISE = frozenset(_NAMES.split())
_LINEAR = "linear"


class TwinEncoding(Tensor):
    """Encodings (B, N, D) that carry the other encodings (B, N, D) of the same prompt.

    Attributes:
        other: what is carried.
        placeholders: the words the two differ in.
        twin_first: whether these encodings are those of the superclass words.
    """

    other: Tensor
    placeholders: frozenset[str]
    twin_first: bool

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function on the first encodings and, where it goes token by token, on the others.

        Where encodings of both orders meet, the twins come first.
        """
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling():
                # Inside of a model without concepts, which sees the first encodings only.
                return func(*args, **kwargs)
            pairs = list(_pairs((args, kwargs)))
            twin_first = any(pair.twin_first for pair in pairs)

            def first(value: Tensor) -> Tensor:
                return _twin(value) if twin_first else _prompt(value)

            def second(value: Tensor) -> Tensor:
                return _prompt(value) if twin_first else _twin(value)

            found = func(*_each(args, first), **_each(kwargs, first))
            name = getattr(func, "__name__", "")
            if name not in _TOKENWISE or _writes_into_a_plain_tensor(name, args, kwargs):
                if name == _LINEAR and not _told_apart.get():
                    _met_a_plain_layer(pairs)
                return found
            others = func(*_each(args, second), **_each(kwargs, second))
            words = frozenset().union(*(pair.placeholders for pair in pairs))
            return _joined(found, others, words, twin_first)


def with_twin(encodings: Tensor, twin: Tensor, placeholders: frozenset[str]) -> Tensor:
    """A prompt's encodings that carry their twin of the same shape; the words they differ in."""
    with torch._C.DisableTorchFunctionSubclass():
        return _joined(encodings, twin, placeholders, twin_first=False)


def within_twin(twin: Tensor, encodings: Tensor, placeholders: frozenset[str]) -> Tensor:
    """The same pair the other way round: the twin, which carries the prompt's encodings."""
    with torch._C.DisableTorchFunctionSubclass():
        return _joined(twin, encodings, placeholders, twin_first=True)


def untwined(encodings: Tensor) -> tuple[Tensor, Tensor]:
    """A prompt's encodings and their twin, in this order, as ordinary tensors.

    Twice the same where there is no placeholder.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return _prompt(encodings), _twin(encodings)


@contextmanager
def told_apart() -> Iterator[None]:
    """While a model with concepts runs: a plain layer that meets a pair is no mistake."""
    token = _told_apart.set(True)
    try:
        yield
    finally:
        _told_apart.reset(token)


_told_apart: ContextVar[bool] = ContextVar("perfusion_told_apart", default=False)


def placeholders_in(encodings: Any) -> frozenset[str]:
    """The placeholders that encodings have a twin for."""
    return encodings.placeholders if isinstance(encodings, TwinEncoding) else frozenset()


def _met_a_plain_layer(pairs: Sequence[TwinEncoding]) -> None:
    # Models with concepts take the two apart before their layers see them.
    for pair in pairs:
        words = ", ".join(sorted(pair.placeholders))
        warn(
            f"a prompt speaks of {words}, but the model that reads it does not carry that "
            "concept; connect the MODEL output of the node that applied it as well"
        )


def _writes_into_a_plain_tensor(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    # A plain tensor has room for one of the two only.
    target = kwargs.get("out")
    written = name == "__setitem__" or name.startswith("__i")
    if target is None and (written or (name.endswith("_") and not name.endswith("__"))):
        target = args[0]
    return target is not None and not isinstance(target, TwinEncoding)


def _prompt(value: Any) -> Any:
    if not isinstance(value, TwinEncoding):
        return value
    return value.other if value.twin_first else value.as_subclass(Tensor)


def _twin(value: Any) -> Any:
    if not isinstance(value, TwinEncoding):
        return value
    return value.as_subclass(Tensor) if value.twin_first else value.other


def _pairs(values: Any) -> Iterator[TwinEncoding]:
    if isinstance(values, TwinEncoding):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _pairs(value)
    elif type(values) is dict:
        for value in values.values():
            yield from _pairs(value)


def _each(values: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, (list, tuple)) and type(values) in (list, tuple):
        return type(values)(_each(value, change) for value in values)
    if type(values) is dict:
        return {key: _each(value, change) for key, value in values.items()}
    return values


def _joined(found: Any, others: Any, placeholders: frozenset[str], twin_first: bool) -> Any:
    if isinstance(found, Tensor):
        joined = found.as_subclass(TwinEncoding)
        joined.other, joined.placeholders = others, placeholders
        joined.twin_first = twin_first
        return joined
    if isinstance(found, (list, tuple)):
        pairs = zip(found, others, strict=True)
        return type(found)(_joined(*pair, placeholders, twin_first) for pair in pairs)
    return found
