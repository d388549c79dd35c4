"""Concepts in the text encoder of an open_clip model.

open_clip encodes; this module only changes the token embeddings that go in, and reads the
encodings of all tokens before they are pooled. Positions, attention mask and final norm are
therefore open_clip's own, whatever its version.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .embedding import EmbeddingReturn, EmbeddingWrapper, Tokenize, open_clip_tokenizer
from .token_rows import real_tokens


class OpenClipEmbedWrapper(nn.Module):
    """An open_clip model's text encoder with a concept of one's own.

    Its `EmbeddingWrapper` is ``wrapped_embed`` and holds the only trainable parameter.

    Args:
        clip: a ``CLIP`` or ``CustomTextCLIP`` of open_clip with a text tower of its own (not one
            of Hugging Face's); it is frozen.
        superclass_string: this and what follows is as in `EmbeddingWrapper`.
        ln_final_path: the last norm within the model, whose output is what cross-attention reads.
        tokenize: open_clip's tokenizer unless given.
        num_concepts: k.
        superclass_embed_id: instead of the string.

    Raises:
        TypeError: for a model without the parts named, saying which.
    """

    def __init__(
        self,
        clip: nn.Module,
        superclass_string: str | None = None,
        *,
        ln_final_path: str = "ln_final",
        tokenize: Tokenize | None = None,
        num_concepts: int = 1,
        superclass_embed_id: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        embed, self._norm_path = _text_parts(clip, ln_final_path)
        if tokenize is None:
            tokenize = open_clip_tokenizer(_context_length(clip))
        self.clip = clip.requires_grad_(False)
        self.wrapped_embed = EmbeddingWrapper(
            embed,
            num_concepts=num_concepts,
            superclass_string=superclass_string,
            superclass_embed_id=superclass_embed_id,
            tokenize=tokenize,
        )

    def forward(
        self,
        x: Tensor | Sequence[str],
        concept_id: int | tuple[int, ...] | None = None,
        return_embed_with_superclass: bool | None = None,
    ) -> EmbeddingReturn:
        """Encodings (B, N, D) with the concept and with its superclass, mask, indices.

        Arguments and errors as in `EmbeddingWrapper.forward`; a superclass of several sub-words
        needs nothing further. Prompts without the concept are encoded as open_clip does it.
        """
        wrapped = self.wrapped_embed
        tokens = wrapped.tokens(x, concept_id, return_embed_with_superclass)
        encodings = self.encode(tokens.ids)
        superclass = None
        if tokens.superclass_ids is not None:
            with torch.no_grad():
                superclass = self.encode(tokens.superclass_ids)
        return wrapped.returned(tokens, encodings, superclass)

    def encode(self, ids: Tensor) -> Tensor:
        """Encodings (B, N, D) of token ids (B, N), concepts' ids among them."""
        plain = ids.masked_fill(ids >= self.wrapped_embed.num_embeds, 1)
        return encode_tokens(self.clip, plain, self.wrapped_embed.vectors(ids), self._norm_path)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encodings (B, N, D) of ordinary texts, no concept in them, and a mask (B, N) bool.

        The mask is True at words and end tokens: what a covariance is measured over.
        """
        wrapped = self.wrapped_embed
        assert wrapped.tokenize is not None
        ids = wrapped.tokenize(list(texts)).to(wrapped.concepts.device)
        mask = real_tokens(ids, wrapped.pad_id, wrapped.eos_id) & (ids != wrapped.sos_id)
        return self.encode(ids), mask


def encode_tokens(
    clip: nn.Module, ids: Tensor, embeds: Tensor | None = None, ln_final_path: str = "ln_final"
) -> Tensor:
    """What an open_clip model's last norm gives for token ids (B, N), before pooling: (B, N, D).

    With ``embeds`` (B, N, dim) these take the place of the token embeddings. Differentiable with
    respect to them.

    Raises:
        TypeError: for a model without the parts.
    """
    embedding, path = _text_parts(clip, ln_final_path)
    taken: list[Tensor] = []
    handles = [clip.get_submodule(path).register_forward_hook(lambda *call: taken.append(call[-1]))]
    if embeds is not None:
        handles.append(embedding.register_forward_hook(lambda *call: embeds))
    try:
        clip.encode_text(ids)  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
    if len(taken) != 1 or taken[0].shape[:2] != ids.shape:
        raise TypeError(
            f"expected encodings {tuple(ids.shape)} x D from '{path}', found "
            f"{[tuple(tensor.shape) for tensor in taken]}; this text tower adds tokens of its own"
        )
    return taken[0]


def _text_parts(clip: nn.Module, ln_final_path: str) -> tuple[nn.Embedding, str]:
    """The token embedding of a model, and the path of its last norm."""
    parts = dict(clip.named_modules())
    # A CustomTextCLIP keeps its text tower one level down.
    prefix = "" if "token_embedding" in parts else "text."
    embedding = parts.get(f"{prefix}token_embedding")
    path = ln_final_path if ln_final_path in parts else f"{prefix}{ln_final_path}"
    usable = isinstance(embedding, nn.Embedding) and path in parts
    if not usable or not callable(getattr(clip, "encode_text", None)):
        raise TypeError(
            f"expected an open_clip model with encode_text, token_embedding and {ln_final_path}, "
            f"found {type(clip).__name__}; for other encoders use EmbeddingWrapper with "
            "clip_transformer_fn"
        )
    assert isinstance(embedding, nn.Embedding)
    return embedding, path


def _context_length(clip: nn.Module) -> int:
    length = getattr(clip, "context_length", None)
    return length if isinstance(length, int) else 77
