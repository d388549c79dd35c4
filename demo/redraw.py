"""Pictures as the text-to-image model draws them: latents that the decoder has to read.

A decoder that has only seen encodings takes every fault of the model's latents for a detail. Here
known pictures are taken part of the way into noise and drawn again from there by their captions:
what comes back has the model's own faults, and its right picture is known.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from comfyui_perfusion.demo.model.small_autoencoder import SmallAutoencoder
from torch import Tensor, nn

from .base_data import SHORT, Data, load_data, say
from .generate import CFG
from .networks import Words, velocity
from .pool import CHUNK, load_chunk, save_atomically
from .train_base import BaseConfig, contexts, noised

STEPS = 8
FIRST, LAST = 100, 690
"""Between these timesteps, of 720, drawing begins."""
FAITHFUL = 0.1
"""Mean square difference of latents up to which it is still the same picture."""
FAITHFUL_BACKGROUND = 0.02
"""And where no thing is. The walls of plain scenes lie close together: a wall that changed its
colour differs by 0.07 in the median, one that did not by 0.005."""
_BATCH = 128


@dataclass
class Drawn:
    """Pictures and their latents as the model draws them."""

    pictures: Tensor  # n 64 64, palette indices
    masks: Tensor  # n 2 8 8
    latents: Tensor  # n 24 8 8, half


@torch.no_grad()
def redraw(
    networks: nn.ModuleDict,
    schedule: Tensor,
    noisy: Tensor,
    t: Tensor,
    said: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor],
) -> Tensor:
    """Latents (n, 24, 8, 8) from ``noisy`` ones at timesteps ``t`` (n,), by DDIM.

    ``said`` and ``empty`` are the contexts (n, tokens, 128) of keys and of values with and without
    a caption; the result has guidance as pictures of the templates have it.
    """
    device, n = noisy.device, len(noisy)
    both = torch.cat([said[0], empty[0]]), torch.cat([said[1], empty[1]])
    clean = x = noisy
    for step in range(STEPS):
        now = (t * (1 - step / STEPS)).long()
        then = (t * (1 - (step + 1) / STEPS)).long()
        with torch.autocast(device.type, torch.bfloat16):
            v = velocity(networks, x.repeat(2, 1, 1, 1), now.repeat(2), both).float()
        v = v[n:].lerp(v[:n], CFG)
        a, s = (k.sqrt().view(-1, 1, 1, 1) for k in (schedule[now], 1 - schedule[now]))
        clean, noise = a * x - s * v, s * x + a * v
        a, s = (k.sqrt().view(-1, 1, 1, 1) for k in (schedule[then], 1 - schedule[then]))
        x = a * clean + s * noise
    return clean


def is_faithful(found: Tensor, latents: Tensor, masks: Tensor) -> Tensor:
    """Which of the latents ``found`` (n, 24, 8, 8) still show the pictures of ``latents``; (n,).

    ``masks`` (n, 2, 8, 8): where the things are. What no caption tells, such as a wall's colour,
    the model may change; a decoder that learned from those would take colours for one another.
    """
    far = (found - latents).square().mean(1)
    background = (masks.amax(1) == 0).float()
    empty = (far * background).sum((1, 2)) / background.sum((1, 2)).clamp(min=1)
    return (far.mean((1, 2)) < FAITHFUL) & (empty < FAITHFUL_BACKGROUND)


@torch.no_grad()
def _redraw_all(
    networks: nn.ModuleDict, schedule: Tensor, data: Data, chunk: int, count: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of a chunk, which are mirrored, bool (n,), and which are still the same picture."""
    g = torch.Generator().manual_seed(8_000_000 + chunk)
    told = say(data.words, chunk, -1, BaseConfig.named_share)
    nothing = data.words.empty[:, :SHORT].to(device)
    latents, mirrored, faithful = [], [], []
    for part in torch.arange(count).split(_BATCH):
        n = len(part)
        side = (torch.rand(n, generator=g) < 0.5).long()
        by_values = (torch.rand(n, generator=g) < BaseConfig.values_share).to(device)
        t = (FIRST + torch.rand(n, generator=g) * (LAST - FIRST)).long().to(device)
        x = data.latents[side.to(device), part.to(device)].float()
        noise = torch.randn(x.shape, generator=g).to(device)
        tokens, named = told.tokens[side, part].long().to(device), told.named[part].to(device)
        looks, blank = data.looks[part.to(device)], nothing.expand(n, -1, -1)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            said, empty = (
                contexts(networks, words[..., 0], words[..., 1], looks, named, by_values)
                for words in (tokens, blank)
            )
        found = redraw(networks, schedule, noised(x, t, schedule, noise)[0], t, said, empty)
        latents.append(found.half().cpu())
        mirrored.append(side > 0)
        masks = data.masks[part.to(device)]
        masks = torch.where((side > 0).view(-1, 1, 1, 1).to(device), masks.flip(-1), masks)
        faithful.append(is_faithful(found, x, masks).cpu())
    return torch.cat(latents), torch.cat(mirrored), torch.cat(faithful)


def drawn_chunk(
    cache: Path,
    networks: nn.ModuleDict,
    schedule: Tensor,
    encoder: SmallAutoencoder,
    chunk: int,
    device: str,
    count: int = CHUNK,
) -> Drawn:
    """Those of a chunk's first ``count`` pictures that came back as the same; kept in ``cache``."""
    path = cache / f"drawn{chunk}.pt"
    if path.exists():
        latents, mirrored, faithful = torch.load(path)
    else:
        data = load_data(cache, encoder, Words(), range(chunk, chunk + 1), device)
        latents, mirrored, faithful = _redraw_all(networks, schedule, data, chunk, count, device)
        save_atomically((latents, mirrored, faithful), path)
    pictures, masks = (x[:count].cpu() for x in load_chunk(chunk, device))
    pictures = torch.where(mirrored.view(-1, 1, 1), pictures.flip(-1), pictures)
    masks = torch.where(mirrored.view(-1, 1, 1, 1), masks.flip(-1), masks)
    kept = (x[faithful].to(device) for x in (pictures, masks, latents))
    return Drawn(*kept)
