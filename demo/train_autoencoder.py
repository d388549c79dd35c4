"""Training of the small world's autoencoder."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from comfyui_perfusion.host.small_autoencoder import LATENT_CHANNELS, SmallAutoencoder
from torch import Tensor, nn

from .muon import Muon, split_parameters
from .palette import PALETTE
from .pool import load_chunk, save_atomically
from .render import to_rgb

log = logging.getLogger("demo.train")


@dataclass(frozen=True)
class AutoencoderConfig:
    """What determines the autoencoder's weights: recorded beside them."""

    steps: int = 1500
    batch: int = 64
    chunks: int = 16
    seed: int = 0
    noise: float = 0.45
    shifted_share: float = 0.25
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


class _Trainer:
    def __init__(self, cache: Path, config: AutoencoderConfig, device: str) -> None:
        self.config, self.device = config, device
        self.state_path = cache / "autoencoder_state.pt"
        torch.manual_seed(config.seed)
        model = SmallAutoencoder()
        model.palette.copy_(PALETTE * 2 - 1)
        for module in model.modules():
            if hasattr(module, "conv2"):
                module.conv2.weight.data.mul_(0.1)
        self.model = model.to(device, memory_format=torch.channels_last)
        matrices, rest = split_parameters(model.named_parameters(), ("voter",))
        self.optimisers = [
            (Muon(matrices, lr=0.01), 0.01),
            (torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0), 2e-3),
        ]
        self.rest = rest
        self.average = {k: v.clone() for k, v in model.state_dict().items()}
        self.step, self.seconds = 0, 0.0
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
        with torch.autocast(self.device, torch.bfloat16):
            z = self.model.encoder(x).float()
            scale = z.detach().std((0, 2, 3), keepdim=True)
            amount = torch.rand(n, 1, 1, 1, generator=g) * config.noise
            noise = torch.randn(z.shape, generator=g).to(self.device)
            features = self.model.decoder(z + noise * scale * amount.to(self.device))
            features = features.permute(0, 2, 3, 1).reshape(n, 64 * 64, -1)
            # A random quarter of the pixels is enough, and a third of the cost.
            where = torch.randint(0, 64 * 64, (config.pixels,), generator=g).to(self.device)
            votes = self.model.voter(features[:, where]).float()
        right = wanted.flatten(1)[:, where].long()
        loss = F.cross_entropy(votes.flatten(0, 1), right.flatten(), reduction="none")
        things = masks.float().amax(1, keepdim=True)
        weight = 1 + F.interpolate(things, size=(64, 64), mode="nearest").flatten(1)[:, where]
        loss = (loss * weight.flatten()).mean() + 1e-3 * z.square().mean()
        for optimiser, rate in self.optimisers:
            factor = min(1.0, (self.step + 1) / 50) * (
                0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / config.steps))
            )
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
        if time.time() > until or (trainer.step % 250 == 0 and trainer.step < config.steps):
            trainer.save(time.time() - started)
        if time.time() > until:
            return None
    model = trainer.model
    model.load_state_dict(trainer.average)
    latents = []
    with torch.no_grad():
        for part in pool[0][0][:2048].split(256):
            latents.append(model.encoder(to_input(part)))
        z = torch.cat(latents)
        model.latent_mean.copy_(z.mean((0, 2, 3), keepdim=True))
        model.latent_std.copy_(z.std((0, 2, 3), keepdim=True))
    held_out = to_rgb(load_chunk(-1, device)[0][:512])
    log.info("autoencoder done: held-out psnr %.2f dB", psnr(model, held_out))
    model = model.to("cpu", memory_format=torch.contiguous_format)
    save_atomically(model.state_dict(), done)
    return model


__all__ = ["LATENT_CHANNELS", "AutoencoderConfig", "psnr", "to_input", "train_autoencoder"]
