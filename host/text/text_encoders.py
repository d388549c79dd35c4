"""Text encoding as ComfyUI's CLIPTextEncode does it, for many short prompts at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.sd import CLIP
from torch import Tensor

from ..models.digests import weights_digest
from ..models.families import (
    Family,
    UnsupportedModelError,
    encoder_models,
    family_of_clip,
    tokenizer_of,
)
from ..models.networks import UNET
from ..models.query_adapter import QueryAdapter
from .marked_words import word_text
from .queries import query_rows, without_vectors

Tokens = list[int | Tensor]


@dataclass(frozen=True, eq=False)
class TextBatch:
    """Encodings (B, N, D) that condition a model, and the pooled outputs (B, P) beside them."""

    encodings: Tensor
    pooled: Tensor | None


class TextEncoders:
    """The text encoders of one CLIP, loaded and set as its nodes would (clip skip included).

    Args:
        clip: the CLIP.
        adapter: of the model that belongs to it, where that one adapts encodings.
    """

    def __init__(self, clip: CLIP, adapter: QueryAdapter | None = None) -> None:
        self.clip = clip
        self.adapter = adapter
        self.family: Family = family_of_clip(clip)
        self._models = {name: encoder_models(clip)[name] for name in self.family.encoders}
        model = clip.cond_stage_model
        model.reset_clip_options()
        if clip.layer_idx is not None:
            model.set_clip_options({"layer": clip.layer_idx})
        clip.load_model()
        model.set_clip_options({"execution_device": clip.patcher.load_device})

    def tokenizer(self, name: str) -> Any:
        """ComfyUI's SDTokenizer of one encoder."""
        return tokenizer_of(self.clip, name)

    def sections(self, prompt: str, padded: bool = True) -> dict[str, list[Tokens]]:
        """Encoder -> sections of token ids (CLIP: 77 each), start, end and padding included.

        What pads to a length of its own, but attends to no padding, can do without: `padded`.
        """
        lengths: dict[str, Any] = {} if padded else {"min_length": 1}
        tokens = self.clip.tokenize(prompt, **lengths)
        return {
            name: [[token for token, *_ in section] for section in tokens[name]]
            for name in self.family.vectors
        }

    def section(self, prompt: str) -> dict[str, Tokens]:
        """The only section of a short prompt, by encoder.

        Raises:
            ValueError: for a prompt longer than one section, naming it.
        """
        sections = self.sections(prompt)
        if any(len(found) > 1 for found in sections.values()):
            raise ValueError(
                f"the prompt {prompt!r} is too long: expected at most 75 tokens; shorten it"
            )
        return {name: found[0] for name, found in sections.items()}

    def word_tokens(self, name: str, word: str) -> list[int]:
        """Token ids of a word or phrase alone, without start, end and padding."""
        return word_tokens(self.tokenizer(name), word)

    def token_vectors(self, name: str, tokens: Sequence[int]) -> Tensor:
        """Rows (n, dim) fp32 of an encoder's token embedding."""
        if name in self.family.queries:
            return self._own_adapter().rows_of(tokens)
        model = self._models[name]
        embedding = model.transformer.get_input_embeddings()
        device = self.clip.patcher.load_device
        ids = torch.tensor(list(tokens), device=device)
        return embedding(ids, out_dtype=torch.float32).detach().clone()

    @property
    def sectioned(self) -> bool:
        """Whether all prompts are sections of one length, which are encoded together."""
        return self.family.network is UNET

    def of_one_length(self, batch: Sequence[dict[str, Tokens]]) -> list[list[dict[str, Tokens]]]:
        """What can be encoded together: all of it, or every prompt by itself."""
        return [list(batch)] if self.sectioned else [[tokens] for tokens in batch]

    def table_rms(self) -> float:
        """The root mean square of the table of the model's adapter."""
        table: Tensor = self._own_adapter().module.embed.weight
        return float(table.detach().float().square().mean().sqrt())

    def encode(self, batch: Sequence[Mapping[str, Tokens]], room: int = 0) -> TextBatch:
        """Encode sections of tokens; differentiable with respect to vectors among them.

        Encoders are concatenated as ComfyUI's models do: l before g, cut to the shorter one; the
        pooled output is that of the last encoder.

        Args:
            batch: the prompts.
            room: tokens up to which prompts of their own lengths are filled with zeros.
        """
        if not self.sectioned:
            return self._one_by_one(batch, room)
        encodings, pooled = [], None
        for name, model in self._models.items():
            out = model.encode([list(tokens[name]) for tokens in batch])
            encodings.append(out[0])
            pooled = out[1]
        shortest = min(encoding.shape[1] for encoding in encodings)
        joined = torch.cat([encoding[:, :shortest] for encoding in encodings], dim=-1)
        return TextBatch(joined, pooled)

    def _one_by_one(self, batch: Sequence[Mapping[str, Tokens]], room: int) -> TextBatch:
        """As the text model itself encodes prompts, with all that it does besides."""
        model: Any = self.clip.cond_stage_model
        queries = self.family.queries
        found, pooled = [], []
        for tokens in batch:
            pairs = {name: [[(token, 1.0) for token in each]] for name, each in tokens.items()}
            made = model.encode_token_weights(without_vectors(pairs, queries))
            encodings, extra = made[:2]
            if queries:
                rows = query_rows(pairs, queries)
                encodings = self._own_adapter().prompt(encodings, made[2], rows)
            second = self.family.network.second
            if second is not None:
                encodings, extra = second.joined_text(encodings, made[2])
            missing = max(0, room - encodings.shape[1])
            found.append(torch.nn.functional.pad(encodings, (0, 0, 0, missing)))
            # Where a model looks at the words alone, it is told which tokens they are.
            pooled.append(made[2]["attention_mask"] if self.family.network.masked else extra)
        lengths = sorted({encodings.shape[1] for encodings in found})
        if len(lengths) > 1:
            raise ValueError(
                f"expected prompts of one length to encode together, found {lengths} tokens; use "
                "captions of as many tokens, or a batch size of 1"
            )
        every = None if any(extra is None for extra in pooled) else torch.cat(pooled)
        return TextBatch(torch.cat(found), every)

    def _own_adapter(self) -> QueryAdapter:
        if self.adapter is None:
            raise UnsupportedModelError(
                f"what {self.family.label} reads is made by an adapter within the model, so the "
                "text encoder alone does not tell it; connect the model to Measure Covariance, or "
                "no covariance to Train Concept, which then measures it itself"
            )
        return self.adapter

    def word_mask(self, tokens: Mapping[str, Tokens]) -> Tensor:
        """(N,) bool: the words of a section and its first end token."""
        return torch.cat([self._words_of(name, tokens[name]) for name in self.family.positions])

    def _words_of(self, name: str, section: Tokens) -> Tensor:
        tokenizer = self.tokenizer(name)
        first = 0 if tokenizer.start_token is None else 1
        stop = tokenizer.end_token if tokenizer.end_token is not None else tokenizer.pad_token
        ends = (at for at, token in enumerate(section) if at >= first and token_is(token, stop))
        last = next(ends, len(section))
        mask = torch.zeros(len(section), dtype=torch.bool)
        mask[first : last + int(tokenizer.end_token is not None)] = True
        return mask

    def digest(self) -> str:
        """16 hexadecimal digits naming the encoder, its layer and the patches on it."""
        return clip_digest(self.clip)


def as_long_as(mask: Tensor, encodings: Tensor) -> Tensor:
    """A mask (B, L) cut or filled up with False to the N tokens of encodings (B, N, D)."""
    tokens = encodings.shape[1]
    return torch.nn.functional.pad(mask[:, :tokens], (0, max(0, tokens - mask.shape[1])))


def clip_digest(clip: CLIP) -> str:
    """16 hexadecimal digits naming a CLIP's encoder, its layer and the patches on it.

    Looked up where the same model with the same patches was asked for before.
    """
    layer = f"{type(clip.cond_stage_model).__name__} {clip.layer_idx}"
    known = _digests.setdefault(clip.patcher.model, {})
    name = (str(clip.patcher.patches_uuid), layer)
    if name not in known:
        known[name] = weights_digest(clip.patcher, layer)
    return known[name]


_digests: WeakKeyDictionary[Any, dict[tuple[str, str], str]] = WeakKeyDictionary()


def word_tokens(tokenizer: Any, word: str) -> list[int]:
    """Token ids of a word or phrase in an SDTokenizer, without start, end and padding.

    Where a token may begin with the space before it, they are those within a sentence.
    """
    end = -1 if tokenizer.tokenizer_adds_end_token else None
    text = word_text(tokenizer, word)
    return list(tokenizer.tokenizer(text)["input_ids"][tokenizer.tokens_start : end])


def token_is(token: int | Tensor, wanted: int) -> bool:
    """Whether a token is this id (a vector never is)."""
    return not isinstance(token, Tensor) and token == wanted
