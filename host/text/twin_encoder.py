"""Encoding prompts with placeholders twice, and saying in the conditioning what they hold.

On one CLIP clone a `TwinEncoder` stands in for the text model's `encode_token_weights`. It is put
into whatever text model the clone's patcher loads, so copies of the clone encode with the weights
of the copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection
from comfy.sd import CLIP
from torch import Tensor

from ...perfusion.concept.concept import Concept
from ..models.families import encoder_models
from .text_encoders import word_tokens
from .twin import with_twin

KEY = "perfusion_twins"
ENCODE = "encode_token_weights"
"""The method of ComfyUI's text models that is replaced while a clone is loaded."""
SPOKEN = "perfusion_spoken"
"""Where a conditioning says what it holds: a `Spoken`."""


@dataclass(frozen=True)
class Spoken:
    """What the text encoder knew of a prompt.

    Attributes:
        known: placeholders that the encoder serves.
        present: those of them that stand in the prompt.
    """

    known: frozenset[str]
    present: frozenset[str]


@dataclass(frozen=True, eq=False)
class _Lock:
    """One placeholder: its vectors and the superclass's tokens, by text encoder."""

    placeholder: str
    strength: float
    vectors: Mapping[str, Tensor]
    superclass: Mapping[str, Sequence[int]]


class TwinEncoder:
    """Takes the place of a text model's `encode_token_weights`.

    Args:
        model: the text model, whose token embedding is used.
        below: what encoded before.
        locks: the placeholders.
    """

    def __init__(self, model: Any, below: Callable[[Any], Any], locks: Sequence[_Lock]) -> None:
        self.below = below
        self.locks = tuple(locks)
        self._model = model

    def __call__(self, tokens: Mapping[str, Any]) -> Any:
        """What the text model gives, the encodings with their twin where a placeholder stands."""
        found = self.below(tokens)
        if not self.locks:
            return found
        present = frozenset(lock.placeholder for lock in self.locks if self._stands(lock, tokens))
        spoken = Spoken(frozenset(lock.placeholder for lock in self.locks), present)
        more = found[2] if len(found) > 2 else {}
        encodings = self._twined(tokens, found[0], present)
        return (encodings, found[1], {**more, SPOKEN: spoken})

    def _twined(self, tokens: Mapping[str, Any], encodings: Tensor, present: frozenset[str]) -> Any:
        chosen = [lock for lock in self.locks if lock.placeholder in present and lock.strength != 0]
        if not chosen:
            return encodings
        keys = before = encodings
        # Strengths blend as h' = (1 - w) W e + w h; one after the other where they differ.
        for strength in sorted({lock.strength for lock in chosen}, reverse=True):
            locks = [lock for lock in chosen if lock.strength >= strength]
            after = self.below({name: self._replaced(name, tokens[name], locks) for name in tokens})
            unblended = strength == 1 and keys is encodings
            keys = after[0] if unblended else keys + strength * (after[0] - before)
            before = after[0]
        return with_twin(encodings, keys, frozenset(lock.placeholder for lock in chosen))

    def _stands(self, lock: _Lock, tokens: Mapping[str, Any]) -> bool:
        return any(
            _is_of(entry[0], lock, name)
            for name, sections in tokens.items()
            for section in sections
            for entry in section
        )

    def _replaced(self, name: str, sections: Any, locks: Sequence[_Lock]) -> Any:
        """Sections with the superclass in place of placeholders."""
        return [
            [(self._superclass(name, entry[0], locks), *entry[1:]) for entry in section]
            for section in sections
        ]

    def _superclass(self, name: str, token: Any, locks: Sequence[_Lock]) -> Any:
        for lock in locks:
            if _is_of(token, lock, name):
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


class _Injection:
    """Puts a `TwinEncoder` into the text models that a CLIP's patcher loads.

    ComfyUI gives a CLIP with hooks a patcher with another text model where its dynamic memory is
    on, and goes on encoding with the model it had: `origin`, whose encoder is replaced as well.
    """

    def __init__(self, locks: Sequence[_Lock], origin: Callable[[], Any]) -> None:
        self.locks = tuple(locks)
        self._origin = origin
        self._live: dict[int, list[tuple[Any, TwinEncoder, Any]]] = {}

    def inject(self, patcher: ModelPatcher) -> None:
        """Take the place of the encoding method; may be called again without an eject."""
        self.eject(patcher)
        origin = self._origin()
        models = [patcher.model, *([origin] if origin not in (None, patcher.model) else [])]
        live = self._live[id(patcher)] = []
        for model in models:
            encoder = TwinEncoder(model, getattr(model, ENCODE), self.locks)
            live.append((model, encoder, vars(model).get(ENCODE)))
            vars(model)[ENCODE] = encoder

    def eject(self, patcher: ModelPatcher) -> None:
        """Give the method back; one that another pack laid over ours stays, ours passes through."""
        for model, encoder, former in self._live.pop(id(patcher), []):
            if vars(model).get(ENCODE) is not encoder:
                encoder.locks = ()
            elif former is None:
                del vars(model)[ENCODE]
            else:
                vars(model)[ENCODE] = former


def with_twins(clip: CLIP, concepts: Sequence[Concept]) -> CLIP:
    """A clone of a CLIP that also encodes what its prompts are with the superclass words.

    `clip` must serve the concepts' placeholders; concepts of strength 0 keep their own vector.
    """
    clone = clip.clone()
    locks: tuple[_Lock, ...] = clip.patcher.get_attachment(KEY) or ()
    encoders = encoder_models(clip)
    locks += tuple(
        _Lock(
            concept.placeholder,
            concept.gate.strength,
            {name: concept.embeddings[name].detach().float() for name in encoders},
            {
                name: word_tokens(getattr(clip.tokenizer, f"clip_{name}"), concept.superclass)
                for name in encoders
            },
        )
        for concept in concepts
    )
    if locks:
        injection = _Injection(locks, weakref.ref(clip.cond_stage_model))
        clone.patcher.set_attachments(KEY, locks)
        clone.patcher.set_injections(KEY, [PatcherInjection(injection.inject, injection.eject)])
    return clone


def _is_of(token: Any, lock: _Lock, name: str) -> bool:
    vector = lock.vectors.get(name)
    return (
        isinstance(token, Tensor) and vector is not None and torch.equal(token.to(vector), vector)
    )
