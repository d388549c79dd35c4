"""Prompts as the closed-form editors want them, encoded as CLIPTextEncode would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...perfusion.closed_form.edit_model import readable
from ...perfusion.text.encoded_prompt import EncodedPrompt
from ..text.text_encoders import TextEncoders, Tokens

BATCH = 32


class PromptEncoder:
    """Encodes prompts with one CLIP, each once; an `EncodePrompts` for the constraint builders.

    Clip skip, LoRA, concatenation, placeholders and prompt weights count as they do in a graph.
    Tokens and pieces are those of the first text encoder; all of them cut text the same way.
    """

    def __init__(self, clip: Any) -> None:
        self.text = TextEncoders(clip)
        self._name = next(iter(self.text.family.encoders))
        self._known: dict[str, EncodedPrompt] = {}

    def __call__(self, prompts: Sequence[str]) -> list[EncodedPrompt]:
        """The encoded prompts, on the CPU. Raises ValueError for one longer than a section."""
        new = list(dict.fromkeys(text for text in prompts if text not in self._known))
        sections = {text: self.text.section(text) for text in new}
        plain = [text for text in new if not self._weighted(text)]
        with torch.no_grad():
            for start in range(0, len(plain), BATCH):
                part = plain[start : start + BATCH]
                rows = self.text.encode([sections[text] for text in part]).encodings
                for text, row in zip(part, rows, strict=True):
                    self._known[text] = self._prompt(text, sections[text], row)
            for text in new:
                if text not in self._known:
                    clip = self.text.clip
                    row, *_ = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
                    self._known[text] = self._prompt(text, sections[text], row)
        return [self._known[text] for text in prompts]

    def _weighted(self, text: str) -> bool:
        sections = self.text.clip.tokenize(text)
        return any(
            weight != 1.0 for found in sections.values() for row in found for _, weight, *_ in row
        )

    def _prompt(self, text: str, section: Mapping[str, Tokens], row: Tensor) -> EncodedPrompt:
        tokens = section[self._name]
        words = self.text.tokenizer(self._name).inv_vocab
        last = int(self.text.word_mask(section).nonzero()[-1])
        return EncodedPrompt(
            text=text,
            tokens=tuple(_token_id(token) for token in tokens),
            pieces=tuple(
                "<vector> " if isinstance(t, Tensor) else readable(words[t]) for t in tokens
            ),
            first=1,
            end=last,
            encodings=row.detach().float().cpu(),
        )


def _token_id(token: int | Tensor) -> int:
    # Ids of words are not negative; the same learned vector is the same token.
    if isinstance(token, Tensor):
        return -1 - abs(hash(token.detach().float().cpu().contiguous().numpy().tobytes()))
    return token
