"""Training of the small world's autoencoder."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from comfyui_perfusion.demo.model.small_autoencoder import (
    DOWNSCALE,
    LATENT_CHANNELS,
    SmallAutoencoder,
)
from torch import Tensor, nn

from .muon import Muon, split_parameters
from .palette import PALETTE
from .pool import load_chunk, save_atomically
from .render import to_rgb
from .train_state import taken_up

log = logging.getLogger("demo.train")


@dataclass(frozen=True)
class AutoencoderConfig:
    """What determines the autoencoder's weights: recorded beside them."""

    steps: int = 3300
    batch: int = 64
    chunks: int = 12
    seed: int = 0
    noise: float = 0.7
    shifted_share: float = 0.1
    pixels: int = 512


def to_input(indices: Tensor) -> Tensor:
    """Palette indices (n, 64, 64) to pictures (n, 3, 64, 64) in [-1, 1], as an encoder likes it."""
    palette = (PALETTE * 2 - 1).to(indices.device)
    return palette[indices.long()].permute(0, 3, 1, 2)


def pictures_to_float(pictures: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def psnr(model: SmallAutoencoder, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio of reconstructions, in dB, over uint8 pictures."""
    errors = [
        (model.decode(model.encode(x)).clamp(-1, 1) - x).square().mean((1, 2, 3))
        for x in pictures_to_float(pictures).split(64)
    ]
    return float((10 * torch.log10(4 / torch.cat(errors).clamp(min=1e-6))).mean())


@torch.no_grad()
def fit_encoder(model: SmallAutoencoder, pictures: Tensor, masks: Tensor) -> None:
    """Set the encoder to the leading principal components of the patches of these pictures.

    ``pictures`` are palette indices (n, 64, 64), ``masks`` (n, 2, 8, 8); patches of backgrounds
    count a quarter of those of things.
    """
    patches, weights = [], []
    for part, mask in zip(pictures.split(512), masks.split(512), strict=True):
        columns = F.unfold(to_input(part), DOWNSCALE, stride=DOWNSCALE)
        patches.append(columns.transpose(1, 2).flatten(0, 1).cpu())
        weights.append(torch.where(mask.float().amax(1).flatten() > 0, 1.0, 0.25).cpu())
    x, weight = torch.cat(patches), torch.cat(weights)[:, None]
    mean = (x * weight).sum(0) / weight.sum()
    covariance = ((x - mean) * weight).T @ (x - mean) / weight.sum()
    _, vectors = torch.linalg.eigh(covariance.double())
    leading = vectors.flip(1)[:, :LATENT_CHANNELS].T.float()
    model.encoder.weight.copy_(leading.view(model.encoder.weight.shape))
    model.encoder.bias.copy_(-leading @ mean)
    z = (x - mean) @ leading.T
    # Half-way to equal variances: a diffusion model then decides colours before details.
    share = z.std(0) / z.std(0).mean()
    model.latent_mean.copy_(z.mean(0).view(1, -1, 1, 1))
    model.latent_std.copy_((z.std(0) / share.sqrt()).view(1, -1, 1, 1))


def make_encoder(cache: Path, seed: int, device: str) -> SmallAutoencoder:
    """An autoencoder with its encoder fitted, its decoder still to be trained."""
    path = cache / "encoder.pt"
    torch.manual_seed(seed)
    model = SmallAutoencoder()
    if path.exists():
        model.load_state_dict(torch.load(path, map_location="cpu"))
        return model.requires_grad_(False)
    begun = taken_up("encoder")
    if begun:
        model.load_state_dict(begun[0]["model"], strict=False)
    model.palette.copy_(PALETTE * 2 - 1)
    for module in model.modules():
        if hasattr(module, "conv2"):
            module.conv2.weight.data.mul_(0.1)
    if not begun:
        fit_encoder(model, *load_chunk(0, device))
    save_atomically(model.state_dict(), path)
    return model.requires_grad_(False)


class _Trainer:
    def __init__(self, cache: Path, config: AutoencoderConfig, device: str) -> None:
        self.config, self.device = config, device
        self.state_path = cache / "autoencoder_state.pt"
        model = make_encoder(cache, config.seed, device)
        model.decoder.requires_grad_(True)
        model.voter.requires_grad_(True)
        self.model = model.to(device, memory_format=torch.channels_last)
        matrices, rest = split_parameters(model.named_parameters(), ("voter",))
        self.optimisers = [
            (Muon(matrices, lr=0.01), 0.01),
            (torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0), 2e-3),
        ]
        self.rest = rest
        self.average = {k: v.clone() for k, v in model.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        begun = taken_up("autoencoder")
        if not self.state_path.exists() and begun:
            groups, about = begun
            model.load_state_dict(groups["average"])
            self.average = {k: v.to(device) for k, v in groups["average"].items()}
            self.step, self.seconds = about["step"], about["seconds"]
        if self.state_path.exists():
            saved = torch.load(self.state_path, map_location=device)
            model.load_state_dict(saved["model"])
            self.average, self.step = saved["average"], saved["step"]
            self.seconds = saved["seconds"]
            for (optimiser, _), old in zip(self.optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(old)

    def save(self, seconds: float) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": seconds,
            "optimisers": [o.state_dict() for o, _ in self.optimisers],
        }
        save_atomically(state, self.state_path)

    def learn(self, pictures: Tensor, masks: Tensor) -> Tensor:
        """One step; returns the share of pixels whose colour was wrong."""
        config, n = self.config, len(pictures)
        g = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        wanted = pictures
        if float(torch.rand(1, generator=g)) < config.shifted_share:
            dy, dx = (int(k) for k in torch.randint(-6, 7, (2,), generator=g))
            wanted = wanted.roll((dy, dx), (1, 2))
        if float(torch.rand(1, generator=g)) < 0.5:
            wanted, masks = wanted.flip(-1), masks.flip(-1)
        x = to_input(wanted)
        grain = torch.rand(n, 1, 1, 1, generator=g) * 0.06
        x = x + torch.randn(x.shape, generator=g).to(self.device) * grain.to(self.device)
        z = self.model.encode(x)
        amount = torch.rand(n, 1, 1, 1, generator=g).square() * config.noise
        z = z + (torch.randn(z.shape, generator=g) * amount).to(self.device)
        with torch.autocast(self.device, torch.bfloat16):
            features = self.model.features(z.contiguous(memory_format=torch.channels_last))
            features = features.permute(0, 2, 3, 1).reshape(n, 64 * 64, -1)
            # Some of the pixels are enough, and a third of the cost: at first those of things.
            background = 0.15 if self.step < 0.6 * config.steps else 0.5
            things = F.interpolate((masks.float().amax(1, keepdim=True) > 0).float(), (64, 64))
            odds = torch.rand(n, 64 * 64, generator=g).to(self.device) * (
                background + (1 - background) * things.flatten(1)
            )
            where = odds.topk(config.pixels, 1, sorted=False).indices
            chosen = features.gather(1, where[..., None].expand(-1, -1, features.shape[-1]))
            votes = self.model.voter(chosen).float()
        right = wanted.flatten(1).gather(1, where).long()
        loss = F.cross_entropy(votes.flatten(0, 1), right.flatten())
        for optimiser, rate in self.optimisers:
            left = (config.steps - self.step) / (0.5 * config.steps)
            factor = min(1.0, (self.step + 1) / 50, 0.02 + 0.98 * left)
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        for optimiser, _ in self.optimisers:
            optimiser.step()
        self.step += 1
        keep = 1 - min(0.995, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, keep)
        return (votes.detach().argmax(-1) != right).float().mean()


def train_autoencoder(
    cache: Path, config: AutoencoderConfig, device: str, until: float = math.inf
) -> SmallAutoencoder | None:
    """Learn to name each pixel's colour; resumes from ``cache``; returns the averaged weights.

    Noise on the latents makes the decoder snap to clean shapes, which is what pictures drawn by a
    diffusion model need. Returns None where ``until`` (as ``time.time``) came first.
    """
    done = cache / "autoencoder.pt"
    model = SmallAutoencoder()
    if done.exists():
        model.load_state_dict(torch.load(done, map_location="cpu"))
        return model
    trainer = _Trainer(cache, config, device)
    pool = [load_chunk(i, device) for i in range(config.chunks)]
    started = time.time() - trainer.seconds
    running = torch.ones((), device=device)
    while trainer.step < config.steps:
        g = torch.Generator().manual_seed(config.seed * 7919 + trainer.step)
        pictures, masks = pool[int(torch.randint(config.chunks, (1,), generator=g))]
        rows = torch.randint(len(pictures), (config.batch,), generator=g).to(device)
        running = running.lerp(trainer.learn(pictures[rows], masks[rows]), 0.02)
        if trainer.step % 50 == 0:
            log.info(
                "autoencoder %d/%d  wrong pixels %.2f %%  %.0f s",
                trainer.step,
                config.steps,
                100 * float(running),
                time.time() - started,
            )
        if time.time() > until or trainer.step % 250 == 0 or trainer.step == config.steps:
            trainer.save(time.time() - started)
        if time.time() > until:
            return None
    model = trainer.model
    model.load_state_dict(trainer.average)
    held_out = to_rgb(load_chunk(-1, device)[0][:512])
    log.info("autoencoder done: held-out psnr %.2f dB", psnr(model, held_out))
    model = model.to("cpu", memory_format=torch.contiguous_format)
    save_atomically(model.state_dict(), done)
    return model
