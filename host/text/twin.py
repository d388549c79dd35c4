"""Global key lock on the text side: every prompt with a placeholder is encoded twice.

The second encoding, the *twin*, has the concepts' superclass words in place of their learned
vectors, at the same positions. It travels inside the first as a `TwinEncoding`, a tensor that
carries another: whatever a graph does to a conditioning token by token (concatenate, average,
scale, cut, move, batch) it does to both, so every stock conditioning node keeps them together.
Anything else sees the first encoding only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...perfusion.concept.concept import Concept
from ..models.families import encoder_models
from .text_encoders import word_tokens

ENCODE = "encode_token_weights"
"""The method of ComfyUI's text models that is replaced on a clone."""

# Functions that treat every token alike, under the name they have both in torch and on tensors.
_NAMES = """
add add_ sub sub_ rsub mul mul_ div div_ true_divide neg lerp lerp_ where
__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__
__itruediv__ __neg__ cat concat stack __getitem__ __setitem__ narrow index_select select split
chunk tensor_split repeat expand expand_as repeat_interleave view reshape unsqueeze squeeze flatten
contiguous to cpu cuda type float half bfloat16 double clone detach __deepcopy__ zeros_like pad
"""
_TOKENWISE = frozenset(_NAMES.split())


class TwinEncoding(Tensor):
    """Encodings (B, N, D) that carry the encodings (B, N, D) the keys are made of."""

    twin: Tensor

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
            found = func(*_each(args, _first), **_each(kwargs, _first))
            if getattr(func, "__name__", "") not in _TOKENWISE:
                return found
            return _joined(found, func(*_each(args, _second), **_each(kwargs, _second)))


def with_twin(encodings: Tensor, twin: Tensor) -> Tensor:
    """Encodings that carry their twin of the same shape."""
    with torch._C.DisableTorchFunctionSubclass():
        return _joined(encodings, twin)


def untwined(encodings: Tensor) -> tuple[Tensor, Tensor]:
    """The encodings and their twin as ordinary tensors; twice the same where there is none."""
    with torch._C.DisableTorchFunctionSubclass():
        return _first(encodings), _second(encodings)


def _first(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, TwinEncoding) else value


def _second(value: Any) -> Any:
    return value.twin if isinstance(value, TwinEncoding) else value


def _each(values: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, (list, tuple)) and type(values) in (list, tuple):
        return type(values)(_each(value, change) for value in values)
    if type(values) is dict:
        return {key: _each(value, change) for key, value in values.items()}
    return values


def _joined(found: Any, twin: Any) -> Any:
    if isinstance(found, Tensor):
        joined = found.as_subclass(TwinEncoding)
        joined.twin = twin
        return joined
    if isinstance(found, (list, tuple)):
        return type(found)(_joined(*pair) for pair in zip(found, twin, strict=True))
    return found


@dataclass(frozen=True, eq=False)
class _Lock:
    """One placeholder: its vectors and the superclass's tokens, by text encoder."""

    strength: float
    vectors: Mapping[str, Tensor]
    superclass: Mapping[str, Sequence[int]]


class TwinEncoder:
    """Takes the place of a text model's `encode_token_weights` on one CLIP clone."""

    def __init__(self, clip: Any, below: Callable[[Any], Any], locks: Sequence[_Lock]) -> None:
        self.below = below
        self.locks = tuple(locks)
        self._model = clip.cond_stage_model

    def __call__(self, tokens: Mapping[str, Any]) -> Any:
        """What the text model gives, the encodings with their twin where a placeholder stands."""
        found = self.below(tokens)
        encodings = keys = found[0]
        before = encodings
        # Strengths blend as h' = (1 - w) W e + w h; one after the other where they differ.
        for strength in sorted({lock.strength for lock in self.locks}, reverse=True):
            locks = [lock for lock in self.locks if lock.strength >= strength]
            replaced = {name: self._replaced(name, tokens[name], locks) for name in tokens}
            if all(replaced[name] is tokens[name] for name in tokens):
                continue
            after = self.below(replaced)[0]
            unblended = strength == 1 and keys is encodings
            keys = after if unblended else keys + strength * (after - before)
            before = after
        if keys is encodings:
            return found
        return (with_twin(encodings, keys), *found[1:])

    def _replaced(self, name: str, sections: Any, locks: Sequence[_Lock]) -> Any:
        """Sections with the superclass in place of placeholders; the same if there are none."""
        changed = [
            [(self._superclass(name, entry[0], locks), *entry[1:]) for entry in section]
            for section in sections
        ]
        same = all(
            new[0] is old[0]
            for section, former in zip(changed, sections, strict=True)
            for new, old in zip(section, former, strict=True)
        )
        return sections if same else changed

    def _superclass(self, name: str, token: Any, locks: Sequence[_Lock]) -> Any:
        if not isinstance(token, Tensor):
            return token
        for lock in locks:
            vector = lock.vectors.get(name)
            if vector is not None and torch.equal(token.to(vector), vector):
                words = lock.superclass[name]
                # The placeholder is one token, so several sub-words become their mean, which is
                # also what training starts from.
                return words[0] if len(words) == 1 else self._mean(name, words)
        return token

    def _mean(self, name: str, words: Sequence[int]) -> Tensor:
        encoder = getattr(self._model, f"clip_{name}")
        embedding = encoder.transformer.get_input_embeddings()
        device = encoder.execution_device or embedding.weight.device
        rows = embedding(torch.tensor(list(words), device=device), out_dtype=torch.float32)
        return rows.mean(0).cpu()


def with_twins(clip: Any, concepts: Sequence[Concept]) -> Any:
    """A clone of a CLIP that also encodes what its prompts are with the superclass words.

    `clip` must serve the concepts' placeholders; concepts of strength 0 keep their own vector.
    """
    clone = clip.clone()
    below = clone.patcher.get_model_object(ENCODE)
    locks: tuple[_Lock, ...] = ()
    if isinstance(below, TwinEncoder):
        below, locks = below.below, below.locks
    encoders = encoder_models(clip)
    locks += tuple(
        _Lock(
            concept.gate.strength,
            {name: concept.embeddings[name].detach().float() for name in encoders},
            {
                name: word_tokens(getattr(clip.tokenizer, f"clip_{name}"), concept.superclass)
                for name in encoders
            },
        )
        for concept in concepts
        if concept.gate.strength != 0
    )
    if locks:
        clone.patcher.add_object_patch(ENCODE, TwinEncoder(clip, below, locks))
    return clone
