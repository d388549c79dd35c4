"""The autoencoder of the small world: 64x64x3 pictures to 8x8x16 latents and back.

It reads any picture but draws in a fixed palette: the decoder ends in one vote per palette colour
and pixel, so what it draws has flat areas and crisp edges however vague the latents are.
"""

import torch
from torch import Tensor, nn

LATENT_CHANNELS = 16
DOWNSCALE = 8
COLORS = 87
"""Colours of the palette; the weights say which."""
_SHARPNESS = 2.0
_FEATURES = 24


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(nn.functional.relu(self.conv1(self.norm(x))))


class SmallAutoencoder(nn.Module):
    """Convolutional autoencoder with the two methods ComfyUI's VAE object calls.

    ``latent_mean`` and ``latent_std`` normalise each latent channel over the training pictures, so
    that a diffusion model sees channels of mean 0 and variance 1. ``palette`` is (colours, 3) in
    [-1, 1].
    """

    def __init__(self, fine: int = 96, coarse: int = 128) -> None:
        super().__init__()
        z = LATENT_CHANNELS
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, fine, 3, padding=1),
            _Residual(fine),
            nn.Conv2d(fine, coarse, 2, stride=2),
            _Residual(coarse),
            _Residual(coarse),
            nn.Conv2d(coarse, z, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(z, coarse, 3, padding=1),
            _Residual(coarse),
            _Residual(coarse),
            _Residual(coarse),
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            _Residual(fine),
            _Residual(fine),
            nn.ReLU(),
            nn.Conv2d(fine, 16 * _FEATURES, 1),
            nn.PixelShuffle(4),
        )
        self.voter = nn.Linear(_FEATURES, COLORS)
        self.latent_mean: Tensor
        self.latent_std: Tensor
        self.palette: Tensor
        self.register_buffer("latent_mean", torch.zeros(1, z, 1, 1))
        self.register_buffer("latent_std", torch.ones(1, z, 1, 1))
        self.register_buffer("palette", torch.zeros(COLORS, 3))

    def encode(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to latents (B, 16, H/8, W/8)."""
        return (self.encoder(x) - self.latent_mean) / self.latent_std

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, 16, h, w) to pictures (B, 3, 8h, 8w) in [-1, 1]."""
        features = self.decoder(z * self.latent_std + self.latent_mean)
        votes = self.voter(features.permute(0, 2, 3, 1))
        shares = (votes * _SHARPNESS).softmax(-1)
        return (shares @ self.palette.to(shares.dtype)).permute(0, 3, 1, 2)
