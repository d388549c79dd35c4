"""The encodings of a concept's and its superclass's place in the training prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..text.prompts import fill
from .config import TrainingConfig
from .denoiser import Conditioning, Denoiser


def training_prompts(config: TrainingConfig, word: str) -> tuple[str, ...]:
    """The sentences of a run, with ``word`` in its place."""
    sentences = tuple(dict.fromkeys(config.captions)) or config.templates
    return tuple(fill(sentence, word) for sentence in sentences)


def superclass_encoding(denoiser: Denoiser, config: TrainingConfig) -> Tensor:
    """Mean over the prompts of the superclass's last sub-word, (D,) fp32."""
    return _mean_encoding(denoiser.encode_superclass, config, config.superclass)


def placeholder_encoding(
    denoiser: Denoiser, config: TrainingConfig, embeddings: Mapping[str, Tensor]
) -> Tensor:
    """Mean over the prompts of the placeholder with these vectors, (D,) fp32."""
    return _mean_encoding(
        lambda prompts: denoiser.encode(prompts, embeddings), config, config.placeholder
    )


def _mean_encoding(
    encode: Callable[[Sequence[str]], Conditioning], config: TrainingConfig, word: str
) -> Tensor:
    tokens = []
    prompts = training_prompts(config, word)
    with torch.no_grad():
        for start in range(0, len(prompts), config.batch_size):
            some = prompts[start : start + config.batch_size]
            tokens.append(last_marked(encode(some), some, word))
    return finite_encoding(torch.cat(tokens).float().mean(0), word)


def finite_encoding(encoding: Tensor, word: str) -> Tensor:
    """The encoding of a word.

    Raises:
        ValueError: for NaN or infinity in it.
    """
    if not bool(torch.isfinite(encoding).all()):
        raise ValueError(
            f"expected a finite encoding of {word!r}, found NaN or infinity; check the text encoder"
        )
    return encoding


def marked_in_parts(
    encoded: Conditioning, prompts: Sequence[str], word: str, parts: Sequence[slice]
) -> Tensor:
    """The encodings (P, B, D) at the last marked position of each prompt in every part.

    Args:
        encoded: the prompts.
        prompts: what they say.
        word: what messages call the concept's own token.
        parts: columns of the encodings that tokens of one text encoder fill.

    Raises:
        ValueError: naming a prompt that has none in one of them.
    """
    if len(parts) == 1:
        return last_marked(encoded, prompts, word)[None]
    found = []
    for columns in parts:
        inside = (encoded.encodings[..., columns] != 0).any(dim=-1).cpu()
        mask = encoded.mask.cpu() & inside
        found.append(last_marked(replace(encoded, mask=mask), prompts, word))
    return torch.stack(found)


def last_marked(encoded: Conditioning, prompts: Sequence[str], word: str) -> Tensor:
    """The encodings (B, D) at the last marked position of each prompt.

    Raises:
        ValueError: naming a prompt that has none.
    """
    mask = encoded.mask.cpu()
    if mask.shape != encoded.encodings.shape[:2] or mask.shape[0] != len(prompts):
        raise ValueError(
            f"expected a mask {(len(prompts), encoded.encodings.shape[1])} for {len(prompts)} "
            f"prompts, found {tuple(mask.shape)}"
        )
    for prompt, present in zip(prompts, mask.any(dim=1).tolist(), strict=True):
        if not present:
            raise ValueError(f"expected {word!r} in every prompt, found {prompt!r} without it")
    last = (mask * torch.arange(mask.shape[1])).argmax(dim=1).tolist()
    return torch.stack([encoded.encodings[row, at] for row, at in enumerate(last)])
