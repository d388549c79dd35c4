"""The prompts of a training, as a private CLIP encodes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from comfy.sd import CLIP
from torch import Tensor

from ...perfusion.training.denoiser import Conditioning
from ..models.families import encoder_models
from ..models.query_adapter import QueryAdapter
from ..models.second_text import words_known
from ..text.marked_words import in_place_of, takes_place_of
from ..text.placeholders import serve_vectors
from ..text.text_encoders import TextEncoders, Tokens, as_long_as
from ..text.twin_vectors import SuperclassWords, served_rows, superclass_words, twin_vector
from .checkpointing import checkpoint_blocks
from .private_copy import unload

ROOM = 256
"""Tokens of a training prompt, where prompts are as long as they are."""


class TrainingText:
    """The text half of a `Denoiser`.

    Args:
        clip: a private one.
        superclass: the everyday word.
        placeholder: the word that is learned.
        device: where encodings go.
        dtype: what the model reads.
        adapter: of the private model, where it adapts encodings.
    """

    def __init__(
        self,
        clip: CLIP,
        superclass: str,
        placeholder: str,
        device: torch.device,
        dtype: torch.dtype,
        adapter: QueryAdapter | None = None,
    ) -> None:
        self.clip = clip
        self.released = False
        self._superclass = superclass
        self._placeholder = placeholder
        self._device = device
        self._dtype = dtype
        self._text = TextEncoders(clip, adapter)
        self._positions = self._text.family.positions
        self.encoder_hash: str = self._text.digest()
        self._own_words = {
            name: self._text.word_tokens(name, superclass) for name in self._text.family.vectors
        }
        marker = {name: torch.zeros(width) for name, width in self._text.family.vectors.items()}
        self._marked = TextEncoders(serve_vectors(clip, placeholder, marker, superclass), adapter)
        self._sections: dict[str, dict[str, Tokens]] = {}

    def checkpoint(self) -> None:
        """Compute blocks of the text encoders again in the backward pass.

        Those of transformers take no part in it: twin lock encodes every prompt once, before.
        """
        if self._text.sectioned:
            checkpoint_blocks(self.clip.cond_stage_model)

    def release(self) -> None:
        """Unload the text encoders; what draws with them loads them again."""
        self.released = True
        unload(self.clip.patcher)

    def initial_embeddings(self) -> dict[str, Tensor]:
        """Text encoder -> token vector (dim,) of the superclass, the mean over its sub-words."""
        return {
            name: self._text.token_vectors(name, tokens).mean(0)
            for name, tokens in self._own_words.items()
        }

    def token_rms(self, encoder: str) -> float:
        """The root mean square of a text encoder's token table."""
        if encoder in self._text.family.queries:
            return self._text.table_rms()
        table = encoder_models(self.clip)[encoder].transformer.get_input_embeddings().weight
        return float(table.detach().float().square().mean().sqrt())

    def encode(self, prompts: Sequence[str], embeddings: Mapping[str, Tensor]) -> Conditioning:
        """Encode prompts that each contain the placeholder, with these token vectors."""
        batch, masks = [], []
        for prompt in prompts:
            section = self._section(self._marked, prompt)
            batch.append(
                {
                    name: [
                        in_place_of(token, embeddings[name]) if isinstance(token, Tensor) else token
                        for token in tokens
                    ]
                    for name, tokens in section.items()
                }
            )
            masks.append(self._marks(section, _vectors))
            self._check_placeholder(prompt, any(masks[-1]))
        return self._encode(batch, masks)

    def encode_superclass(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts that each contain the superclass, the mask on all its sub-words."""
        batch, masks = [], []
        for prompt in prompts:
            section = self._section(self._text, prompt)
            name = self._positions[0]
            tokens, word = section[name], self._own_words[name]
            starts = [at for at in range(len(tokens)) if tokens[at : at + len(word)] == word]
            if not starts:
                raise ValueError(
                    f"the superclass {self._superclass!r} is missing from the prompt {prompt!r}; "
                    "every training prompt must contain it"
                )
            positions = range(starts[0], starts[0] + len(word))
            masks.append([at in positions for at in range(len(tokens))])
            batch.append(section)
        return self._encode(batch, masks)

    def random_embeddings(self) -> dict[str, Tensor]:
        """Text encoder -> the random vector (dim,) that names the concept."""
        words = superclass_words(self.clip, self._superclass)
        likes = {name: each.rows[-1] for name, each in words.items()}
        for name in self._text.family.queries:
            likes[name] = self._text.token_vectors(name, self._own_words[name])[-1]
        return {name: twin_vector(self._placeholder, name, like) for name, like in likes.items()}

    def encode_twins(
        self, prompts: Sequence[str], embeddings: Mapping[str, Tensor]
    ) -> tuple[Conditioning, Conditioning]:
        """Encode prompts as they stand and their twins, the masks on the concept's own token."""
        words = superclass_words(self.clip, self._superclass)
        rows = {**embeddings, **served_rows(words, embeddings)}
        clip = serve_vectors(self.clip, self._placeholder, rows, self._superclass, twin_lock=True)
        served = TextEncoders(clip, self._text.adapter)
        named, twins, masks = [], [], []
        for prompt in prompts:
            section = served.section(prompt)
            named.append(section)
            twins.append({name: _twin(each, words.get(name)) for name, each in section.items()})
            masks.append(self._marks(section, _last_vectors))
            self._check_placeholder(prompt, any(masks[-1]))
        return self._only_words_differ(self._encode(named, masks), self._encode(twins, masks))

    def _only_words_differ(
        self, named: Conditioning, twin: Conditioning
    ) -> tuple[Conditioning, Conditioning]:
        """Prompts and twins, of the former only the words where the model reads no padding."""
        if self._text.family.network.second is None or named.extra is None:
            return named, twin
        words = words_known(named.extra).to(named.encodings.device)
        encodings = torch.where(words, named.encodings, twin.encodings)
        return replace(named, encodings=encodings), twin

    def _marks(
        self, section: Mapping[str, Tokens], mark: Callable[[Tokens], list[bool]]
    ) -> list[bool]:
        """Marks of the tokens of every text encoder that has positions of its own."""
        return [each for name in self._positions for each in mark(section[name])]

    def _check_placeholder(self, prompt: str, found: bool) -> None:
        if not found:
            raise ValueError(
                f"the placeholder {self._placeholder!r} is missing from the prompt {prompt!r}; "
                "every training prompt must contain it"
            )

    def _section(self, text: TextEncoders, prompt: str) -> dict[str, Tokens]:
        if prompt not in self._sections:
            self._sections[prompt] = text.section(prompt)
        return self._sections[prompt]

    def _encode(self, batch: list[dict[str, Tokens]], masks: list[list[bool]]) -> Conditioning:
        longest = max(len(row) for row in masks)
        mask = torch.tensor([row + [False] * (longest - len(row)) for row in masks])
        found = self._text.encode(batch, ROOM if self._text.family.network.unpadded else 0)
        # What the projections will read at inference is what the gate must be trained on.
        encodings = found.encodings.to(self._device, self._dtype)
        return Conditioning(encodings, as_long_as(mask, encodings), found.pooled)


def _twin(tokens: Tokens, words: SuperclassWords | None) -> Tokens:
    """The same tokens with the superclass's sub-words where the placeholder's vectors are."""
    own = iter(() if words is None else words.tokens)
    return [_own(token, own) if isinstance(token, Tensor) else token for token in tokens]


def _own(vector: Tensor, words: Iterator[int]) -> int:
    """What stands in a vector's place in the twin: what it took the place of, or the next word."""
    found = takes_place_of(vector)
    return found[-1] if found else next(words)


def _vectors(tokens: Tokens) -> list[bool]:
    """Where vectors stand."""
    return [isinstance(token, Tensor) for token in tokens]


def _last_vectors(tokens: Tokens) -> list[bool]:
    """Where the last of the placeholder's vectors stands."""
    vectors = _vectors(tokens)
    return [here and not after for here, after in zip(vectors, [*vectors[1:], False], strict=True)]
