"""Placeholder words in prompts: a concept's token vectors served from memory.

A CLIP clone gets a shallow copy of its tokenizer whose sub-tokenizers know the placeholders. In
a prompt a placeholder becomes a reference to an embedding, the way ComfyUI writes embedding files,
with the vector coming from memory; so prompt weights, long prompts and every stock text node work
as they do with embedding files. Placeholders match whatever their case, as CLIP lower-cases all
text. A prompt without one takes exactly the stock path.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..perfusion.concept import Concept
from .families import embedding_width, encoder_models

logger = logging.getLogger("perfusion")

# Not a number: "(embedding:7)" would read as the weight 7.
_REFERENCE = "perfusion-placeholder-"
# Characters the prompt syntax gives a meaning of its own.
_FORBIDDEN = re.compile(r"[\s()\\:{}|]")


class PlaceholderError(ValueError):
    """A placeholder word that cannot be used."""


def check_placeholder(placeholder: str) -> None:
    """Make sure a word can stand for a concept in prompts.

    Raises:
        PlaceholderError: for an empty word, one without any letter or digit, one with characters
            of the prompt syntax.
    """
    remedy = "use one word such as <thing>"
    if not re.search(r"\w", placeholder):
        raise PlaceholderError(f"the placeholder {placeholder!r} has no letter or digit; {remedy}")
    found = _FORBIDDEN.search(placeholder)
    if found:
        raise PlaceholderError(
            f"the placeholder {placeholder!r} contains {found.group()!r}, which has a meaning of "
            f"its own in prompts; {remedy}"
        )


def is_existing_word(clip: Any, word: str) -> bool:
    """Whether every text encoder's vocabulary knows `word` as one single token."""
    sections = clip.tokenizer.tokenize_with_weights(word)
    counts = []
    for name, tokens in sections.items():
        tokenizer = getattr(clip.tokenizer, f"clip_{name}")
        ends = [getattr(tokenizer, part) for part in ("start_token", "end_token", "pad_token")]
        counts.append(sum(token not in ends for token, *_ in tokens[0]))
    return all(count == 1 for count in counts)


def with_placeholders(clip: Any, concepts: Sequence[Concept]) -> Any:
    """A clone of a ComfyUI CLIP whose prompts know the concepts' placeholders.

    Raises:
        PlaceholderError: for an unusable placeholder or one that is taken.
        ValueError: for a vector missing for a text encoder or of the wrong width.
    """
    clone = clip.clone()
    if not concepts:
        return clone
    clone.tokenizer = copy.copy(clip.tokenizer)
    encoders = encoder_models(clip)
    for concept in concepts:
        check_placeholder(concept.placeholder)
        _check_vectors(concept, encoders)
        if is_existing_word(clip, concept.placeholder):
            logger.warning(
                "the placeholder %r is a word of its own; prompts can no longer use that word",
                concept.placeholder,
            )
    for name in encoders:
        attribute = f"clip_{name}"
        tokenizer = copy.copy(getattr(clone.tokenizer, attribute))
        tokenizer.__class__ = _placeholder_class(_stock_class(type(tokenizer)))
        known = dict(getattr(tokenizer, "placeholder_vectors", {}))
        for concept in concepts:
            word = concept.placeholder.lower()
            if word in known:
                raise PlaceholderError(
                    f"the placeholder {concept.placeholder!r} is used by two concepts; each needs "
                    "one of its own, train one of them under another placeholder"
                )
            known[word] = _rows(concept.embeddings[name])
        tokenizer.placeholder_vectors = known
        setattr(clone.tokenizer, attribute, tokenizer)
    return clone


class _PlaceholderTokenizer:
    """Mixed into an SDTokenizer: placeholders become references to in-memory embeddings."""

    placeholder_vectors: dict[str, Tensor]
    embedding_directory: Any

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
        """As the stock tokenizer; sections of (token id or vector, weight)."""
        words = list(self.placeholder_vectors)
        pattern = _pattern(tuple(words))

        def reference(match: re.Match[str]) -> str:
            # ComfyUI recognises an embedding after whitespace only.
            return f" embedding:{_REFERENCE}{words.index(match.group().lower())} "

        replaced, count = pattern.subn(reference, text)
        tokenizer: Any = self
        if count and self.embedding_directory is None:
            # Without a folder the stock code does not look embeddings up at all.
            tokenizer = copy.copy(self)
            tokenizer.embedding_directory = []
        stock = super(_PlaceholderTokenizer, tokenizer)
        return stock.tokenize_with_weights(replaced, *args, **kwargs)  # type: ignore[misc]

    def _try_get_embedding(self, embedding_name: str) -> tuple[Tensor | None, str, str]:
        name, _, rest = embedding_name.partition(" ")
        for index, vectors in enumerate(self.placeholder_vectors.values()):
            if name == f"{_REFERENCE}{index}":
                return vectors, name, rest.strip()
        return super()._try_get_embedding(embedding_name)  # type: ignore[misc]


@functools.cache
def _placeholder_class(stock: type) -> type:
    return type(f"Placeholder{stock.__name__}", (_PlaceholderTokenizer, stock), {})


def _stock_class(kind: type) -> type:
    return kind.__mro__[2] if issubclass(kind, _PlaceholderTokenizer) else kind


@functools.cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    # The longest first, so that no placeholder hides in another; and only whole words.
    parts = [_whole_word(word) for word in sorted(words, key=len, reverse=True)]
    return re.compile("|".join(parts), re.IGNORECASE)


def _whole_word(word: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return f"{before}{re.escape(word)}{after}"


def _rows(vectors: Tensor) -> Tensor:
    return vectors.detach().reshape(-1, vectors.shape[-1]).float()


def _check_vectors(concept: Concept, encoders: dict[str, Any]) -> None:
    for name, encoder in encoders.items():
        vectors = concept.embeddings.get(name)
        width = embedding_width(encoder)
        if vectors is None or vectors.shape[-1] != width:
            found = "none" if vectors is None else f"one {vectors.shape[-1]} wide"
            raise ValueError(
                f"concept {concept.placeholder!r} needs a token vector {width} wide for the text "
                f"encoder clip_{name}, found {found}; use the CLIP of the model family the concept "
                f"was trained for ({concept.family})"
            )
