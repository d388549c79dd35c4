"""The small world's encoder: fitted, not trained, to patches of its pictures."""

from pathlib import Path

import torch
import torch.nn.functional as F
from comfyui_perfusion.demo.model.small_autoencoder import (
    DOWNSCALE,
    LATENT_CHANNELS,
    SmallAutoencoder,
)
from torch import Tensor

from .palette import PALETTE
from .pool import load_chunk, save_atomically
from .train_state import taken_up


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
