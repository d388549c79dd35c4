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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comfy.sd import CLIP
from torch import Tensor

from ...perfusion.concept.concept import Concept
from ...perfusion.text.words import word_pattern
from ..models.families import (
    attribute_of,
    encoder_label,
    encoder_models,
    encoder_widths,
    query_widths,
    tokenizer_of,
)
from .marked_words import MarkedWords, Served, mark, spaces_matter
from .twin_vectors import served_rows, superclass_words

logger = logging.getLogger("perfusion")

_EMBEDDING_FILES = (".safetensors", ".pt", ".bin")
# Not a number: "(embedding:7)" would read as the weight 7.
_REFERENCE = "perfusion-placeholder-"


class PlaceholderError(ValueError):
    """A placeholder word that cannot be used."""


def is_existing_word(clip: CLIP, word: str) -> bool:
    """Whether every text encoder's vocabulary knows `word` as one single token."""
    sections = clip.tokenizer.tokenize_with_weights(word)
    counts = []
    for name, tokens in sections.items():
        tokenizer = tokenizer_of(clip, name)
        ends = [getattr(tokenizer, part) for part in ("start_token", "end_token", "pad_token")]
        counts.append(sum(token not in ends for token, *_ in tokens[0]))
    return all(count == 1 for count in counts)


def embedding_file(clip: CLIP, word: str) -> Path | None:
    """The embedding file that "embedding:<word>" in a prompt stands for, if there is one."""
    for name in encoder_models(clip):
        places = tokenizer_of(clip, name).embedding_directory or ()
        for place in [places] if isinstance(places, str) else places:
            for ending in ("", *_EMBEDDING_FILES):
                if (file := Path(place) / f"{word}{ending}").is_file():
                    return file
    return None


def with_placeholders(clip: CLIP, concepts: Sequence[Concept], twin_lock: bool = False) -> Any:
    """A clone of a ComfyUI CLIP whose prompts know the concepts' placeholders.

    Under twin lock a placeholder stands for as many tokens as its superclass has (`twin_vectors`).

    Raises:
        PlaceholderError: for a placeholder that is taken.
        ValueError: for a vector missing for a text encoder or of the wrong width, and under twin
            lock for a superclass of too many sub-words.
    """
    widths = {**encoder_widths(clip), **query_widths(clip)}
    for concept in concepts:
        _check_vectors(concept, widths)
        if is_existing_word(clip, concept.placeholder):
            logger.warning(
                "the placeholder %r is a word of its own; prompts can no longer use that word",
                concept.placeholder,
            )
        if file := embedding_file(clip, concept.placeholder):
            logger.warning(
                "the placeholder %r is also the name of the embedding file %s; %s means the "
                "concept and embedding:%s the file",
                concept.placeholder,
                file,
                concept.placeholder,
                concept.placeholder,
            )
    for concept in concepts:
        vectors = concept.embeddings
        if twin_lock:
            rows = served_rows(superclass_words(clip, concept.superclass), vectors)
            vectors = {**vectors, **rows}
        clip = serve_vectors(clip, concept.placeholder, vectors, concept.superclass, twin_lock)
    return clip if concepts else clip.clone()


def serve_vectors(
    clip: CLIP,
    placeholder: str,
    vectors: Mapping[str, Tensor],
    superclass: str = "",
    twin_lock: bool = False,
) -> Any:
    """A clone of a CLIP that puts `vectors` (encoder -> (dim,) or (n, dim)) for a word.

    Tokenizers to which spaces matter cut a prompt with the superclass in the word's place, and
    the last of the vectors takes the place of the superclass's tokens, of the last one alone under
    twin lock (`marked_words`).

    Raises:
        PlaceholderError: when the word is taken already.
    """
    clone = clip.clone()
    clone.tokenizer = copy.copy(clip.tokenizer)
    for name in (*encoder_models(clip), *query_widths(clip)):
        tokenizer = copy.copy(tokenizer_of(clone, name))
        if not isinstance(tokenizer, _PlaceholderTokenizer):
            tokenizer.__class__ = _placeholder_class(type(tokenizer))
            tokenizer.placeholder_vectors = {}
        word = placeholder.lower()
        if word in tokenizer.placeholder_vectors:
            raise PlaceholderError(
                f"the placeholder {placeholder!r} is used by two concepts; each needs one of its "
                "own, train one of them under another placeholder"
            )
        rows = vectors[name].detach().float()
        served = {word: Served(rows.reshape(-1, rows.shape[-1]), superclass, twin_lock)}
        tokenizer.placeholder_vectors = tokenizer.placeholder_vectors | served
        setattr(clone.tokenizer, attribute_of(clone.tokenizer, name), tokenizer)
    return clone


class _PlaceholderTokenizer:
    """Mixed into an SDTokenizer: placeholders become references to in-memory embeddings."""

    placeholder_vectors: dict[str, Served]
    embedding_directory: Any

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
        """As the stock tokenizer; sections of (token id or vector, weight)."""
        words = list(self.placeholder_vectors)
        pattern = _pattern(tuple(words))
        if spaces_matter(self):
            return self._marked(text, pattern, *args, **kwargs)

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

    def _marked(self, text: str, pattern: re.Pattern[str], *args: Any, **kwargs: Any) -> Any:
        words = list(self.placeholder_vectors)
        marked, count = pattern.subn(lambda found: mark(words.index(found.group().lower())), text)
        tokenizer: Any = self
        if count:
            tokenizer = copy.copy(self)
            tokenizer.tokenizer = MarkedWords(self, list(self.placeholder_vectors.values()))
        stock = super(_PlaceholderTokenizer, tokenizer)
        return stock.tokenize_with_weights(marked, *args, **kwargs)  # type: ignore[misc]

    def _try_get_embedding(self, embedding_name: str) -> tuple[Tensor | None, str, str]:
        name, _, rest = embedding_name.partition(" ")
        for index, served in enumerate(self.placeholder_vectors.values()):
            if name == f"{_REFERENCE}{index}":
                return served.rows, name, rest.strip()
        return super()._try_get_embedding(embedding_name)  # type: ignore[misc]


@functools.cache
def _placeholder_class(stock: type) -> type:
    return type(f"Placeholder{stock.__name__}", (_PlaceholderTokenizer, stock), {})


@functools.cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    # The longest first, so that no placeholder hides in another; and only whole words.
    parts = [_whole_word(word) for word in sorted(words, key=len, reverse=True)]
    return re.compile("|".join(parts), re.IGNORECASE)


def _whole_word(word: str) -> str:
    # After "embedding:" it is the name of a file.
    return f"(?<!embedding:){word_pattern(word)}"


def _check_vectors(concept: Concept, widths: Mapping[str, int]) -> None:
    for name, width in widths.items():
        vectors = concept.embeddings.get(name)
        if vectors is None or vectors.shape[-1] != width:
            found = "none" if vectors is None else f"one {vectors.shape[-1]} wide"
            raise ValueError(
                f"concept {concept.placeholder!r} needs a token vector {width} wide for the text "
                f"encoder {encoder_label(name)}, found {found}; use the CLIP of the model family "
                f"the concept was trained for ({concept.family})"
            )
