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
from ..models.families import Family, encoder_models, family_of_clip, tokenizer_of

Tokens = list[int | Tensor]


@dataclass(frozen=True, eq=False)
class TextBatch:
    """Encodings (B, N, D) that condition a model, and the pooled outputs (B, P) beside them."""

    encodings: Tensor
    pooled: Tensor | None


class TextEncoders:
    """The text encoders of one CLIP, loaded and set as its nodes would (clip skip included)."""

    def __init__(self, clip: CLIP) -> None:
        self.clip = clip
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

    def sections(self, prompt: str) -> dict[str, list[Tokens]]:
        """Encoder -> sections of token ids (77 each, start, end and padding included)."""
        tokens = self.clip.tokenize(prompt)
        return {
            name: [[token for token, *_ in section] for section in tokens[name]]
            for name in self._models
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
        model = self._models[name]
        embedding = model.transformer.get_input_embeddings()
        device = self.clip.patcher.load_device
        ids = torch.tensor(list(tokens), device=device)
        return embedding(ids, out_dtype=torch.float32).detach().clone()

    def encode(self, batch: Sequence[Mapping[str, Tokens]]) -> TextBatch:
        """Encode sections of tokens; differentiable with respect to vectors among them.

        Encoders are concatenated as ComfyUI's models do: l before g, cut to the shorter one; the
        pooled output is that of the last encoder.
        """
        encodings, pooled = [], None
        for name, model in self._models.items():
            out = model.encode([list(tokens[name]) for tokens in batch])
            encodings.append(out[0])
            pooled = out[1]
        shortest = min(encoding.shape[1] for encoding in encodings)
        joined = torch.cat([encoding[:, :shortest] for encoding in encodings], dim=-1)
        return TextBatch(joined, pooled)

    def word_mask(self, tokens: Mapping[str, Tokens]) -> Tensor:
        """(N,) bool: the words of a section and its first end token."""
        name = next(iter(self._models))
        end = self.tokenizer(name).end_token
        section = tokens[name]
        last = next(at for at, token in enumerate(section) if at > 0 and token_is(token, end))
        mask = torch.zeros(len(section), dtype=torch.bool)
        mask[1 : last + 1] = True
        return mask

    def digest(self) -> str:
        """16 hexadecimal digits naming the encoder, its layer and the patches on it."""
        return clip_digest(self.clip)


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
    """Token ids of a word or phrase alone in an SDTokenizer, without start, end and padding."""
    end = -1 if tokenizer.tokenizer_adds_end_token else None
    return list(tokenizer.tokenizer(word)["input_ids"][tokenizer.tokens_start : end])


def token_is(token: int | Tensor, wanted: int) -> bool:
    """Whether a token is this id (a vector never is)."""
    return not isinstance(token, Tensor) and token == wanted
