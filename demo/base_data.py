"""What trains the text-to-image model: latents of rendered pictures and captions for them."""

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from comfyui_perfusion.demo.model.small_autoencoder import SmallAutoencoder
from torch import Tensor

from .captions import marked_captions
from .networks import Words
from .pool import CHUNK, chunk_specs, load_chunk, save_atomically
from .specs import LOOK, Specs, ordinary
from .train_encoder import to_input

SHORT = 32
"""Tokens that all captions fit in, of a prompt's 77: what most training steps make do with."""


@dataclass
class Said:
    """Captions of some pictures."""

    tokens: Tensor  # 2 n 32 2, int16: rows of the embedding table, owners; [1] is mirrored
    named: Tensor  # n 2, bool: which things have a name of their own in these captions


@dataclass
class Data:
    """Latents (2, n, 24, 8, 8) of pictures and their mirror images, and what trains them."""

    latents: Tensor
    masks: Tensor  # n 2 8 8
    looks: Tensor  # n 2 6
    words: Words


def say(words: Words, chunk: int, epoch: int, named_share: float) -> Said:
    """Captions of one chunk, new ones for every epoch.

    Things whose look no words can tell go by a name, and ``named_share`` of the ordinary ones.
    """
    seed = chunk * 10_007 + epoch
    specs = chunk_specs(chunk)
    named = torch.rand(CHUNK, 2, generator=torch.Generator().manual_seed(seed)) < named_share
    named |= ~ordinary(specs)
    out = []
    for mirrored in (False, True):
        shown = replace(specs, first_is_left=~specs.first_is_left) if mirrored else specs
        tokens = words.encode(marked_captions(shown, seed * 2 + mirrored, named))
        out.append(tokens[:, :SHORT].to(torch.int16))
    return Said(torch.stack(out), named)


_WORDS: list[Words] = []


def _say_there(chunk: int, epoch: int, named_share: float) -> tuple:
    torch.set_num_threads(1)
    said = say(_WORDS[0], chunk, epoch, named_share)
    return said.tokens.numpy(), said.named.numpy()


class Speaker:
    """Makes captions; ``apart``, in processes of its own, ahead of their use."""

    def __init__(self, words: Words, named_share: float, device: str, apart: bool) -> None:
        self.words, self.named_share, self.device = words, named_share, device
        self.pool: ProcessPoolExecutor | None = None
        self.ahead: dict[tuple[int, int], Future] = {}
        if apart:
            _WORDS[:] = [words]
            count = max(1, (os.cpu_count() or 2) - 2)
            self.pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"))

    def prepare(self, chunks: range, epoch: int) -> None:
        """Begin with the captions of an epoch."""
        if self.pool:
            for chunk in chunks:
                key = chunk, epoch
                self.ahead[key] = self.pool.submit(_say_there, chunk, epoch, self.named_share)

    def say(self, chunks: range, epoch: int) -> Said:
        """The captions of an epoch."""
        if self.pool and (chunks[0], epoch) not in self.ahead:
            self.prepare(chunks, epoch)
        parts = []
        for chunk in chunks:
            if self.pool:
                tokens, named = self.ahead.pop((chunk, epoch)).result()
                parts.append(Said(torch.from_numpy(tokens), torch.from_numpy(named)))
            else:
                parts.append(say(self.words, chunk, epoch, self.named_share))
        tokens, named = torch.cat([p.tokens for p in parts], 1), torch.cat([p.named for p in parts])
        return Said(tokens.to(self.device), named.to(self.device))


_ON_DEVICE: dict[int, tuple[Tensor, Tensor]] = {}


def _chunk_latents(
    cache: Path, autoencoder: SmallAutoencoder, chunk: int, device: str
) -> tuple[Tensor, Tensor]:
    path = cache / f"latents{chunk}.pt"
    if chunk in _ON_DEVICE:
        return _ON_DEVICE[chunk]
    if device == "cpu" and path.exists():
        return torch.load(path)
    pictures, masks = load_chunk(chunk, device)
    sides = []
    for side in (pictures, pictures.flip(-1)):
        parts = [autoencoder.encode(to_input(x)).half() for x in side.split(512)]
        sides.append(torch.cat(parts).contiguous())
    out = torch.stack(sides), masks
    if device == "cpu":
        save_atomically(out, path)
    else:
        _ON_DEVICE[chunk] = out
    return out


@torch.no_grad()
def load_data(
    cache: Path, autoencoder: SmallAutoencoder, words: Words, chunks: range, device: str
) -> Data:
    """Pictures of the given chunks, encoded; on the CPU they are kept in ``cache``."""
    latents, masks, specs = [], [], []
    for old in [c for c in _ON_DEVICE if c not in chunks]:
        _ON_DEVICE.pop(old)
    for chunk in chunks:
        pair, small = _chunk_latents(cache, autoencoder, chunk, device)
        latents.append(pair)
        masks.append(small)
        specs.append(chunk_specs(chunk))
    all_specs = Specs(
        **{f.name: torch.cat([getattr(s, f.name) for s in specs]) for f in fields(Specs)}
    )
    looks = torch.stack([getattr(all_specs, name) for name in LOOK], -1).to(device)
    return Data(torch.cat(latents, 1), torch.cat(masks), looks, words)
