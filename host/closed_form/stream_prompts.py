"""Prompts of newer text encoders as the closed-form editors want them: a stream of tokens each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from comfy.sd import CLIP
from torch import Tensor

from ...perfusion.closed_form.even_sample import Rows
from ...perfusion.closed_form.matching import words_of
from ...perfusion.text.encoded_prompt import EncodedPrompt
from ...perfusion.text.pieces import readable_pieces
from ..text.prompt_streams import Encoded, Stream, tokenizer_of
from .prompts import BATCH, batched, token_id, token_names

KEPT_BYTES = 2**30
"""Of conditionings that are kept, so that asking for a prompt again soon costs nothing."""
TEMPLATE_START, TEMPLATE_END = "<|im_start|>", "<|im_end|>"


class Conditionings:
    """Prompts encoded as CLIPTextEncode does; the ones asked for last are kept."""

    def __init__(self, clip: CLIP, keep: int = KEPT_BYTES) -> None:
        """Begin with nothing.

        Args:
            clip: encodes the prompts.
            keep: bytes of conditionings to keep, the last one always.
        """
        self.clip = clip
        self._keep = keep
        self._known: dict[str, tuple[Encoded, dict[str, Any]]] = {}

    def __call__(self, text: str) -> tuple[Encoded, dict[str, Any]]:
        """What a prompt is encoded to, on the CPU, and its tokens by tokenizer."""
        found = self._known.pop(text, None)
        if found is None:
            tokens = self.clip.tokenize(text)
            with torch.no_grad():
                encoded: Any = self.clip.encode_from_tokens(tokens, return_dict=True)
            found = {name: _on_cpu(value) for name, value in encoded.items()}, tokens
        self._known[text] = found
        size = sum(_size(encoded) for encoded, _ in self._known.values())
        for old in list(self._known)[:-1]:
            if size <= self._keep:
                break
            size -= _size(self._known.pop(old)[0])
        return found


class StreamEncoder:
    """Encodes prompts into one stream's tokens; an `EncodePrompts` for the constraint builders."""

    def __init__(
        self, known: Conditionings, stream: Stream, between: Callable[[Rows], Rows] | None = None
    ) -> None:
        """Encode for a linear map that reads this stream.

        Args:
            known: encodes, shared by all streams of a CLIP.
            stream: whose tokens.
            between: what stands between the encodings and the linear map, token by token.
        """
        self._known = known
        self._stream = stream
        self._between = between
        self._tokenizer = tokenizer_of(known.clip, stream)
        # Asked for once: it is made anew each time, and has 256,000 entries for UMT5.
        vocabulary: Mapping[str, int] = self._tokenizer.tokenizer.get_vocab()
        self._template = vocabulary.get(TEMPLATE_START), vocabulary.get(TEMPLATE_END)

    def __call__(self, prompts: Sequence[str]) -> list[EncodedPrompt]:
        """The encoded prompts, on the CPU.

        Raises:
            ValueError: for a prompt that brings a template of its own, for one longer than a
                section, and for a tokenizer that joins words.
        """
        # All of them before any passes what is between: that and the text encoder may not fit into
        # memory together.
        for text in prompts:
            self._known(self._stream.before + text)
        return [self._prompt(text) for text in prompts]

    def stream(self, prompts: Iterable[str]) -> Iterator[EncodedPrompt]:
        """The encoded prompts one after the other, for many that need not be held together."""
        for part in batched(prompts, BATCH):
            yield from self(part)

    def _prompt(self, text: str) -> EncodedPrompt:
        if text.lstrip().startswith(("<|im_start|>", "<|start_header_id|>")):
            raise ValueError(
                f"the prompt {text[:40]!r} brings a template of its own: expected the prompt "
                "alone, the text encoder puts its template around it"
            )
        encoded, tokens = self._known(self._stream.before + text)
        sections = tokens[self._stream.key]
        if len(sections) != 1:
            raise ValueError(
                f"the prompt {text!r} is too long: expected one section of tokens, found "
                f"{len(sections)}; shorten it"
            )
        ids = [token for token, *_ in sections[0]]
        rows = self._stream.rows(encoded, len(ids))
        if self._stream.masked:
            read = int(encoded["attention_mask"].sum())
            ids, rows = ids[:read], rows[:read]
        pieces = readable_pieces(token_names(ids, self._tokenizer.inv_vocab))
        first, end = self._bounds(ids)
        if self._stream.before:
            first = self._behind(self._stream.before)
        # Of a template that the text encoder cuts off in front only the tokens behind have rows.
        cut = len(ids) - len(rows)
        rows = rows.float()
        found = EncodedPrompt(
            text=text,
            tokens=tuple(token_id(token) for token in ids[cut:]),
            pieces=tuple(pieces[cut:]),
            first=max(0, first - cut),
            end=end - cut,
            encodings=rows if self._between is None else self._between(rows),
        )
        if len(text.split()) > max(1, len(words_of(found))):
            raise ValueError(
                f"the tokenizer {self._stream.key} of this installation joins the words of "
                f"{text!r}, so that they cannot be told apart; a tokenizer of transformers 4 keeps "
                "them apart (those of 5 lose Llama's spaces)"
            )
        return found

    def _behind(self, before: str) -> int:
        ids = [
            token for token, *_ in self._known.clip.tokenize(before.strip())[self._stream.key][0]
        ]
        return self._bounds(ids)[1]

    def _bounds(self, ids: Sequence[int | Tensor]) -> tuple[int, int]:
        # Where the words begin and end among tokens that no encoder has cut yet.
        tokenizer, (start, end) = self._tokenizer, self._template
        if start is not None and end is not None and any(_is(token, end) for token in ids):
            # <|im_start|> user newline, the words, <|im_end|> and what asks for an answer.
            last = max(at for at, token in enumerate(ids) if _is(token, end))
            first = max(at for at in range(last) if _is(ids[at], start))
            return first + 3, last
        first = int(tokenizer.start_token is not None and _is(ids[0], tokenizer.start_token))
        if tokenizer.end_token is not None:
            ends = (at for at in range(first, len(ids)) if _is(ids[at], tokenizer.end_token))
            return first, next(ends, len(ids))
        stop = len(ids)
        while stop > first and _is(ids[stop - 1], tokenizer.pad_token):
            stop -= 1
        return first, stop


def _is(token: int | Tensor, wanted: int) -> bool:
    return not isinstance(token, Tensor) and token == wanted


def _on_cpu(value: object) -> object:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _size(encoded: Encoded) -> int:
    return sum(value.nbytes for value in encoded.values() if isinstance(value, Tensor))
