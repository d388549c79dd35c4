"""Two encodings of one prompt that go through a graph as one tensor.

Every prompt with a placeholder is encoded twice. The second encoding, the *twin*, has the
concepts' superclass words in place of their learned vectors, at the same positions: global key
lock makes the keys of it, and ControlNets read it. It travels inside the first as a
`TwinEncoding`, a tensor that carries another: whatever a graph does to a conditioning token by
token (concatenate, average, scale, cut, move, batch) it does to both, so every stock conditioning
node keeps them together. Anything else sees the first encoding only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """Encodings (B, N, D) that carry the encodings (B, N, D) of the superclass words.

    Attributes:
        twin: the second encodings.
        placeholders: the words the two differ in.
    """

    twin: Tensor
    placeholders: frozenset[str]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function on the first encodings and, where it goes token by token, on the twins."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling():
                # Inside of a model without concepts, which sees the first encodings only.
                return func(*args, **kwargs)
            found = func(*_each(args, _first), **_each(kwargs, _first))
            name = getattr(func, "__name__", "")
            if name not in _TOKENWISE or _writes_into_a_plain_tensor(name, args, kwargs):
                if name == _LINEAR:
                    _met_a_plain_layer(args)
                return found
            words = frozenset().union(*(each.placeholders for each in _pairs((args, kwargs))))
            return _joined(found, func(*_each(args, _second), **_each(kwargs, _second)), words)


def with_twin(encodings: Tensor, twin: Tensor, placeholders: frozenset[str]) -> Tensor:
    """Encodings that carry their twin of the same shape, and the words the two differ in."""
    with torch._C.DisableTorchFunctionSubclass():
        return _joined(encodings, twin, placeholders)


def untwined(encodings: Tensor) -> tuple[Tensor, Tensor]:
    """The encodings and their twin as ordinary tensors; twice the same where there is none."""
    with torch._C.DisableTorchFunctionSubclass():
        return _first(encodings), _second(encodings)


def placeholders_in(encodings: Any) -> frozenset[str]:
    """The placeholders that encodings have a twin for."""
    return encodings.placeholders if isinstance(encodings, TwinEncoding) else frozenset()


def _met_a_plain_layer(args: Sequence[Any]) -> None:
    # Models with concepts take the two apart before their layers see them.
    for pair in _pairs(args):
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


def _first(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, TwinEncoding) else value


def _second(value: Any) -> Any:
    return value.twin if isinstance(value, TwinEncoding) else value


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


def _joined(found: Any, twin: Any, placeholders: frozenset[str]) -> Any:
    if isinstance(found, Tensor):
        joined = found.as_subclass(TwinEncoding)
        joined.twin, joined.placeholders = twin, placeholders
        return joined
    if isinstance(found, (list, tuple)):
        each = (_joined(*pair, placeholders) for pair in zip(found, twin, strict=True))
        return type(found)(each)
    return found
