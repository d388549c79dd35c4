"""Prompts through a tokenizer and a text encoder of the transformers library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from ..shapes import Encodings
from ..text.encoded_prompt import EncodedPrompt, EncodePrompts
from ..text.pieces import readable_pieces


def prompt_encoder(tokenizer: Any, text_encoder: Any) -> EncodePrompts:
    """An encoder for prompts from a tokenizer and a text encoder of the transformers library.

    Prompts are padded to the tokenizer's length; the last hidden state is used, as Stable Diffusion
    1.x and 2.x do.

    Args:
        tokenizer: must give start (if it has one), words, end, padding, in this order.
        text_encoder: called with ids (B, N), gives encodings (B, N, D) first.

    Returns:
        A callable that raises ValueError for a prompt that is too long.
    """

    def encode(prompts: Sequence[str]) -> list[EncodedPrompt]:
        prompts = list(prompts)
        if not prompts:
            return []
        length = tokenizer.model_max_length
        rows: list[list[int]] = tokenizer(prompts, padding="max_length")["input_ids"]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > length:
                raise ValueError(
                    f"the prompt {prompt!r} is too long: expected at most {length} tokens, found "
                    f"{len(row)}; shorten it"
                )
        device = next(text_encoder.parameters()).device
        with torch.no_grad():
            encodings: Encodings = text_encoder(torch.tensor(rows, device=device))[0]
        return [_prompt(tokenizer, *each) for each in zip(prompts, rows, encodings, strict=True)]

    return encode


def _prompt(
    tokenizer: Any, text: str, row: list[int], encodings: Annotated[Tensor, "N D"]
) -> EncodedPrompt:
    first = int(tokenizer.bos_token_id is not None and row[0] == tokenizer.bos_token_id)
    pieces = readable_pieces(tokenizer.convert_ids_to_tokens(row))
    end = row.index(tokenizer.eos_token_id, first)
    return EncodedPrompt(text, tuple(row), pieces, first, end, encodings.detach())
