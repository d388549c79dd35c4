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
from ..models.families import encoder_models, encoder_of, query_widths, tokenizer_of
from ..models.networks import SECOND_TEXTS
from ..models.query_adapter import QUERIES
from .marked_words import takes_place_of
from .queries import query_rows, without_vectors
from .text_encoders import word_tokens
from .twin import with_twin, within_twin
from .twin_vectors import served_rows, superclass_words

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
    """One placeholder: its rows (n, dim) and the superclass's tokens, by text encoder.

    `twin`: it was applied with twin lock, and has a row for every token of the superclass.
    `queries`: names among them of tables that are the diffusion model's.
    """

    placeholder: str
    strength: float
    rows: Mapping[str, Tensor]
    superclass: Mapping[str, Sequence[int]]
    twin: bool = False
    queries: frozenset[str] = frozenset()


class TwinEncoder:
    """Takes the place of a text model's `encode_token_weights`.

    Args:
        model: the text model, whose token embedding is used.
        below: what encoded before.
        locks: the placeholders.
    """

    def __init__(self, model: Any, below: Callable[[Any], Any], locks: Sequence[_Lock]) -> None:
        self.below = below
        self._queries = frozenset(name for lock in locks for name in lock.queries)
        self.locks = tuple(locks)
        self._model = model

    def __call__(self, tokens: Mapping[str, Any]) -> Any:
        """What the text model gives, in pairs where a placeholder stands."""
        if not self.locks:
            return self.below(tokens)
        present = [lock for lock in self.locks if self._stands(lock, tokens)]
        if any(lock.twin for lock in present):
            found = self._read_as_superclass(tokens, present)
        else:
            found = self._read_as_written(tokens, present)
        known, words = (
            frozenset(lock.placeholder for lock in each) for each in (self.locks, present)
        )
        more = found[2] if len(found) > 2 else {}
        return (found[0], found[1], {**more, SPOKEN: Spoken(known, words)})

    def _read_as_superclass(self, tokens: Mapping[str, Any], present: Sequence[_Lock]) -> Any:
        """Twin lock: all that the text model gives of the twin, which carries the prompt's."""
        found = self._encoded(self._with_superclass(tokens, present))
        silent = [lock for lock in present if lock.strength == 0]
        if len(silent) == len(present):
            return found
        spoken = self._with_superclass(tokens, silent)
        words = frozenset(lock.placeholder for lock in present if lock not in silent)
        prompt = self._encoded(spoken)
        first = within_twin(found[0], prompt[0], words)
        more = found[2] if len(found) > 2 else {}
        seconds = {
            name: within_twin(more[name], prompt[2][name], words)
            for name in SECOND_TEXTS
            if name in more
        }
        rest = ({**more, **seconds},) if seconds else found[2:]
        return self._with_queries((first, found[1], *rest), spoken)

    def _read_as_written(self, tokens: Mapping[str, Any], present: Sequence[_Lock]) -> Any:
        """Local and global lock: all that the text model gives of the prompt, with its twin."""
        found = self._with_queries(self._encoded(tokens), tokens)
        chosen = [lock for lock in present if lock.strength != 0]
        if not chosen:
            return found
        keys = before = encodings = found[0]
        # Strengths blend as h' = (1 - w) W e + w h; one after the other where they differ.
        for strength in sorted({lock.strength for lock in chosen}, reverse=True):
            locks = [lock for lock in chosen if lock.strength >= strength]
            after = self._encoded(self._with_superclass(tokens, locks))
            unblended = strength == 1 and keys is encodings
            keys = after[0] if unblended else keys + strength * (after[0] - before)
            before = after[0]
        words = frozenset(lock.placeholder for lock in chosen)
        return (with_twin(encodings, keys, words), *found[1:])

    def _encoded(self, tokens: Mapping[str, Any]) -> Any:
        """What the text model gives; it takes ids only where a table is the diffusion model's."""
        return self.below(without_vectors(tokens, self._queries))

    def _with_queries(self, found: Any, tokens: Mapping[str, Any]) -> Any:
        """What the text model gave, with the vectors that stand in such tables' rows."""
        rows = query_rows(tokens, self._queries)
        if not rows:
            return found
        more = found[2] if len(found) > 2 else {}
        return (found[0], found[1], {**more, QUERIES: rows})

    def _stands(self, lock: _Lock, tokens: Mapping[str, Any]) -> bool:
        return any(
            _is_row(entry[0], lock.rows[name][-1])
            for name, sections in tokens.items()
            if name in lock.rows
            for section in sections
            for entry in section
        )

    def _with_superclass(self, tokens: Mapping[str, Any], locks: Sequence[_Lock]) -> Any:
        """Tokens with the superclass in place of these placeholders."""
        if not locks:
            return tokens
        return {
            name: [
                [(self._superclass(name, entry[0], locks), *entry[1:]) for entry in section]
                for section in sections
            ]
            for name, sections in tokens.items()
        }

    def _superclass(self, name: str, token: Any, locks: Sequence[_Lock]) -> Any:
        own = takes_place_of(token)
        for lock in locks:
            words = lock.superclass.get(name, ())
            for at, row in enumerate(lock.rows.get(name, ())):
                if not _is_row(token, row):
                    continue
                if own:
                    one = len(own) == 1 or name in self._queries
                    return own[0] if one else self._mean(name, own)
                # A placeholder that is one token stands for the mean of several sub-words, which
                # is also what training starts from.
                one_by_one = len(words) == len(lock.rows[name])
                return words[at] if one_by_one else self._mean(name, words)
        return token

    def _mean(self, name: str, words: Sequence[int]) -> Tensor:
        encoder = encoder_of(self._model, name)
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


def with_twins(clip: CLIP, concepts: Sequence[Concept], twin_lock: bool = False) -> CLIP:
    """A clone of a CLIP that also encodes what its prompts are with the superclass words.

    `clip` must serve the concepts' placeholders. Concepts of strength 0 keep their own vector, but
    under twin lock read as their superclass.

    Raises:
        ValueError: for a CLIP that serves concepts with twin lock and others.
    """
    clone = clip.clone()
    locks: tuple[_Lock, ...] = clip.patcher.get_attachment(KEY) or ()
    if concepts and any(lock.twin != twin_lock for lock in locks):
        served, found = ("another", "twin") if twin_lock else ("twin", "another")
        raise ValueError(
            f"the text encoder serves concepts with {served} key lock; expected the same for those "
            f"applied after them, found {found}; choose one for all Apply Concepts in a row"
        )
    locks += tuple(_lock_of(clip, concept, twin_lock) for concept in concepts)
    if locks:
        injection = _Injection(locks, weakref.ref(clip.cond_stage_model))
        clone.patcher.set_attachments(KEY, locks)
        clone.patcher.set_injections(KEY, [PatcherInjection(injection.inject, injection.eject)])
    return clone


def _lock_of(clip: CLIP, concept: Concept, twin_lock: bool) -> _Lock:
    word, strength = concept.placeholder, concept.gate.strength
    tables = frozenset(query_widths(clip))
    queries = {name: concept.embeddings[name].detach().float()[None] for name in tables}
    if twin_lock:
        words = superclass_words(clip, concept.superclass)
        rows = {**served_rows(words, concept.embeddings), **queries}
        superclass = {name: each.tokens for name, each in words.items()}
        return _Lock(word, strength, rows, superclass, True, tables)
    names = encoder_models(clip)
    rows = {name: concept.embeddings[name].detach().float()[None] for name in names}
    rows |= queries
    superclass = {name: word_tokens(tokenizer_of(clip, name), concept.superclass) for name in names}
    return _Lock(word, strength, rows, superclass, queries=tables)


def _is_row(token: Any, row: Tensor) -> bool:
    return isinstance(token, Tensor) and torch.equal(token.to(row), row)
