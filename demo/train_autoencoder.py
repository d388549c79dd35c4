"""Training of the small world's autoencoder."""

import logging
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from comfyui_perfusion.demo.model.small_autoencoder import LATENT_CHANNELS, SmallAutoencoder
from torch import Tensor, nn

from .muon import Muon, split_parameters
from .pool import load_chunk, save_atomically

log = logging.getLogger("demo.train")


def pictures_to_float(pictures: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pictures.float() / 127.5 - 1


def psnr(model: SmallAutoencoder, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio of reconstructions, in dB, over uint8 pictures."""
    with torch.no_grad():
        errors = [
            (model.decode(model.encode(x)).clamp(-1, 1) - x).square().mean((1, 2, 3))
            for x in pictures_to_float(pictures).split(64)
        ]
    return float((10 * torch.log10(4 / torch.cat(errors))).mean())


def train_autoencoder(
    cache: Path, steps: int, batch: int, chunks: int, seed: int
) -> SmallAutoencoder:
    """Learn to reconstruct rendered pictures; resumes from ``cache``; returns the averaged weights.

    L1 + L2 + gradient loss, things counted threefold; a small KL term and noise on the latents keep
    them smooth enough for a diffusion model.
    """
    done, state = cache / "autoencoder.pt", cache / "autoencoder_state.pt"
    model = SmallAutoencoder()
    if done.exists():
        model.load_state_dict(torch.load(done))
        return model
    torch.manual_seed(seed)
    spread = nn.Conv2d(128, LATENT_CHANNELS, 3, padding=1)  # log variance, needed in training only
    model = SmallAutoencoder()
    for module in model.modules():
        if hasattr(module, "conv2"):
            module.conv2.weight.data.mul_(0.1)
    both = nn.ModuleDict({"model": model, "spread": spread})
    matrices, rest = split_parameters(both.named_parameters())
    optimisers = [
        (Muon(matrices, lr=0.01), 0.01),
        (torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0), 2e-3),
    ]
    average = {k: v.clone() for k, v in model.state_dict().items()}
    step = 0
    if state.exists():
        saved = torch.load(state)
        both.load_state_dict(saved["both"])
        average, step = saved["average"], saved["step"]
        for (optimiser, _), old in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(old)
    pool = [load_chunk(cache, i) for i in range(chunks)]
    held_out = load_chunk(cache, -1)[0][:512]
    started, running = time.time(), 0.0
    while step < steps:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pictures, masks = pool[int(torch.randint(chunks, (1,), generator=g))]
        rows = torch.randint(len(pictures), (batch,), generator=g)
        x = pictures_to_float(pictures[rows])
        weight = 1 + 2 * F.interpolate(masks[rows][:, None], size=x.shape[-2:], mode="nearest")
        factor = min(1.0, (step + 1) / 50) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        for optimiser, rate in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        h = model.encoder[:-1](x)
        mean, log_variance = model.encoder[-1](h), spread(h).clamp(-12, 4)
        noisy = mean + torch.randn(mean.shape, generator=g) * (0.5 * log_variance).exp()
        scale = (
            mean.detach().std((0, 2, 3), keepdim=True)
            * torch.rand(batch, 1, 1, 1, generator=g)
            * 0.2
        )
        difference = model.decoder(noisy + torch.randn(mean.shape, generator=g) * scale) - x
        dx = difference[..., 1:] - difference[..., :-1]
        dy = difference[..., 1:, :] - difference[..., :-1, :]
        loss = (difference.abs() * weight).mean() + (difference.square() * weight).mean()
        loss = (
            loss
            + 0.5 * (dx.abs() * weight[..., 1:]).mean()
            + 0.5 * (dy.abs() * weight[..., 1:, :]).mean()
        )
        loss = loss + 1e-4 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        for optimiser, _ in optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(rest, 1.0)
        for optimiser, _ in optimisers:
            optimiser.step()
        step += 1
        keep = 1 - min(0.995, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            average[name].lerp_(value, keep)
        error = difference.detach().square().mean().item()
        running = error if not running else 0.98 * running + 0.02 * error
        if step % 50 == 0:
            log.info(
                "autoencoder %d/%d  psnr %.2f dB  %.0f s",
                step,
                steps,
                10 * math.log10(4 / running),
                time.time() - started,
            )
        if step % 300 == 0 and step < steps:
            save_atomically(
                {
                    "both": both.state_dict(),
                    "average": average,
                    "step": step,
                    "optimisers": [o.state_dict() for o, _ in optimisers],
                },
                state,
            )
    model.load_state_dict(average)
    with torch.no_grad():
        latents = torch.cat(
            [model.encode(pictures_to_float(part)) for part in pool[0][0][:2048].split(256)]
        )
    model.latent_mean.copy_(latents.mean((0, 2, 3), keepdim=True))
    model.latent_std.copy_(latents.std((0, 2, 3), keepdim=True))
    log.info("autoencoder done: held-out psnr %.2f dB", psnr(model, held_out))
    save_atomically(model.state_dict(), done)
    return model
