"""The prompts of a training, as a private CLIP encodes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from comfy.sd import CLIP
from torch import Tensor

from ...perfusion.training.denoiser import Conditioning
from ..models.families import encoder_models
from ..text.placeholders import serve_vectors
from ..text.text_encoders import TextEncoders, Tokens
from ..text.twin_vectors import SuperclassWords, served_rows, superclass_words, twin_vector
from .checkpointing import checkpoint_blocks
from .private_copy import unload


class TrainingText:
    """The text half of a `Denoiser`.

    Args:
        clip: a private one.
        superclass: the everyday word.
        placeholder: the word that is learned.
        device: where encodings go.
        dtype: what the model reads.
    """

    def __init__(
        self,
        clip: CLIP,
        superclass: str,
        placeholder: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.clip = clip
        self.released = False
        self._superclass = superclass
        self._placeholder = placeholder
        self._device = device
        self._dtype = dtype
        self._text = TextEncoders(clip)
        self.encoder_hash: str = self._text.digest()
        self._own_words = {
            name: self._text.word_tokens(name, superclass) for name in self._text.family.encoders
        }
        marker = {name: torch.zeros(width) for name, width in self._text.family.encoders.items()}
        self._marked = TextEncoders(serve_vectors(clip, placeholder, marker))
        self._sections: dict[str, dict[str, Tokens]] = {}

    def checkpoint(self) -> None:
        """Compute blocks of the text encoders again in the backward pass."""
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
        table = encoder_models(self.clip)[encoder].transformer.get_input_embeddings().weight
        return float(table.detach().float().square().mean().sqrt())

    def encode(self, prompts: Sequence[str], embeddings: Mapping[str, Tensor]) -> Conditioning:
        """Encode prompts that each contain the placeholder, with these token vectors."""
        batch, masks = [], []
        for prompt in prompts:
            section = self._section(self._marked, prompt)
            batch.append(
                {
                    name: [embeddings[name] if isinstance(t, Tensor) else t for t in tokens]
                    for name, tokens in section.items()
                }
            )
            masks.append([isinstance(token, Tensor) for token in next(iter(section.values()))])
            self._check_placeholder(prompt, any(masks[-1]))
        return self._encode(batch, torch.tensor(masks))

    def encode_superclass(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts that each contain the superclass, the mask on all its sub-words."""
        batch, masks = [], []
        for prompt in prompts:
            section = self._section(self._text, prompt)
            name, tokens = next(iter(section.items()))
            word = self._own_words[name]
            starts = [at for at in range(len(tokens)) if tokens[at : at + len(word)] == word]
            if not starts:
                raise ValueError(
                    f"the superclass {self._superclass!r} is missing from the prompt {prompt!r}; "
                    "every training prompt must contain it"
                )
            positions = range(starts[0], starts[0] + len(word))
            masks.append([at in positions for at in range(len(tokens))])
            batch.append(section)
        return self._encode(batch, torch.tensor(masks))

    def random_embeddings(self) -> dict[str, Tensor]:
        """Text encoder -> the random vector (dim,) that names the concept."""
        return {
            name: twin_vector(self._placeholder, name, self._text.token_vectors(name, tokens)[-1])
            for name, tokens in self._own_words.items()
        }

    def encode_twins(
        self, prompts: Sequence[str], embeddings: Mapping[str, Tensor]
    ) -> tuple[Conditioning, Conditioning]:
        """Encode prompts as they stand and their twins, the masks on the concept's own token."""
        words = superclass_words(self.clip, self._superclass)
        rows = served_rows(words, embeddings)
        served = TextEncoders(serve_vectors(self.clip, self._placeholder, rows))
        named, twins, masks = [], [], []
        for prompt in prompts:
            section = served.section(prompt)
            named.append(section)
            twins.append({name: _twin(tokens, words[name]) for name, tokens in section.items()})
            masks.append(_last_vectors(next(iter(section.values()))))
            self._check_placeholder(prompt, any(masks[-1]))
        mask = torch.tensor(masks)
        return self._encode(named, mask), self._encode(twins, mask)

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

    def _encode(self, batch: list[dict[str, Tokens]], mask: Tensor) -> Conditioning:
        found = self._text.encode(batch)
        # What the projections will read at inference is what the gate must be trained on.
        encodings = found.encodings.to(self._device, self._dtype)
        return Conditioning(encodings, mask[:, : encodings.shape[1]], found.pooled)


def _twin(tokens: Tokens, words: SuperclassWords) -> Tokens:
    """The same tokens with the superclass's sub-words where the placeholder's vectors are."""
    own = iter(words.tokens)
    return [next(own) if isinstance(token, Tensor) else token for token in tokens]


def _last_vectors(tokens: Tokens) -> list[bool]:
    """Where the last of the placeholder's vectors stands."""
    vectors = [isinstance(token, Tensor) for token in tokens]
    return [here and not after for here, after in zip(vectors, [*vectors[1:], False], strict=True)]
