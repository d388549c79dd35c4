"""Prompts as the closed-form editors want them, encoded as CLIPTextEncode would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from comfy.sd import CLIP
from torch import Tensor

from ...perfusion.text.encoded_prompt import EncodedPrompt
from ...perfusion.text.pieces import readable_pieces
from ..text.text_encoders import TextEncoders, Tokens

BATCH = 32
KEPT = 256
"""Prompts whose encodings are kept, so that asking again soon costs nothing."""


class PromptEncoder:
    """Encodes prompts with one CLIP; an `EncodePrompts` for the constraint builders.

    Clip skip, LoRA, concatenation, placeholders and prompt weights count as they do in a graph.
    Tokens and pieces are those of the first text encoder; all of them cut text the same way. The
    prompts asked for last are kept, so that asking again costs nothing.

    Attributes:
        text: the CLIP's text encoders.
    """

    def __init__(self, clip: CLIP, keep: int = KEPT) -> None:
        """Load the CLIP's networks.

        Args:
            clip: of a known family.
            keep: prompts whose encodings are kept.
        """
        self._keep = keep
        self.text = TextEncoders(clip)
        self._name = next(iter(self.text.family.encoders))
        self._known: dict[str, EncodedPrompt] = {}

    def __call__(self, prompts: Sequence[str]) -> list[EncodedPrompt]:
        """The encoded prompts, on the CPU.

        Raises:
            ValueError: for a prompt longer than a section.
        """
        new = [text for text in dict.fromkeys(prompts) if text not in self._known]
        found = {text: self._known[text] for text in prompts if text in self._known}
        found |= self._encode(new)
        # The ones asked for last come last, and stay.
        self._known = {text: each for text, each in self._known.items() if text not in found}
        self._known |= found
        for text in list(self._known)[: -self._keep]:
            del self._known[text]
        return [found[text] for text in prompts]

    def stream(self, prompts: Iterable[str]) -> Iterator[EncodedPrompt]:
        """The encoded prompts one after the other, for many that need not be held together."""
        for part in batched(prompts, BATCH):
            yield from self(part)

    def _encode(self, prompts: Sequence[str]) -> dict[str, EncodedPrompt]:
        sections = {text: self.text.section(text) for text in prompts}
        weighted = {text for text in prompts if self._weighted(text)}
        found: dict[str, EncodedPrompt] = {}
        with torch.no_grad():
            for part in batched((text for text in prompts if text not in weighted), BATCH):
                rows = self.text.encode([sections[text] for text in part]).encodings
                for text, row in zip(part, rows, strict=True):
                    found[text] = self._prompt(text, sections[text], row)
            for text in weighted:
                clip = self.text.clip
                encoded: Any = clip.encode_from_tokens(clip.tokenize(text))
                found[text] = self._prompt(text, sections[text], encoded[0])
        return found

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
            tokens=tuple(token_id(token) for token in tokens),
            pieces=readable_pieces(token_names(tokens, words)),
            first=1,
            end=last,
            encodings=row.detach().float().cpu(),
        )


def token_id(token: int | Tensor) -> int:
    """A token's id; below 0 for a learned vector, the same for the same vector."""
    if isinstance(token, Tensor):
        return -1 - abs(hash(token.detach().float().cpu().contiguous().numpy().tobytes()))
    return token


def token_names(tokens: Iterable[int | Tensor], vocabulary: Mapping[int, str]) -> list[str]:
    """The vocabulary's entry for each token; a learned vector is a word of its own."""
    return [
        f"\u2581vector{-token_id(token)}"
        if isinstance(token, Tensor)
        else vocabulary.get(token, f"<{token}>")
        for token in tokens
    ]


def batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """The texts in lists of this size, the last one shorter."""
    rest = iter(texts)
    while part := list(islice(rest, size)):
        yield part
