"""The autoencoder of the small world: 48x48x3 pictures to 8x8x12 latents and back."""

import torch
from torch import Tensor, nn

LATENT_CHANNELS = 12
DOWNSCALE = 6


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        return x + self.conv2(nn.functional.silu(self.norm2(h)))


class SmallAutoencoder(nn.Module):
    """Convolutional autoencoder with the two methods ComfyUI's VAE object calls.

    ``latent_mean`` and ``latent_std`` normalise each latent channel over the training pictures, so
    that a diffusion model sees channels of mean 0 and variance 1.
    """

    def __init__(self, fine: int = 64, coarse: int = 128) -> None:
        super().__init__()
        z = LATENT_CHANNELS
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(3),
            nn.Conv2d(27, fine, 3, padding=1),
            _Residual(fine),
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1),
            _Residual(coarse),
            _Residual(coarse),
            nn.Conv2d(coarse, z, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(z, coarse, 3, padding=1),
            _Residual(coarse),
            _Residual(coarse),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(coarse, fine, 3, padding=1),
            _Residual(fine),
            _Residual(fine),
            _Residual(fine),
            nn.GroupNorm(8, fine),
            nn.SiLU(),
            nn.Conv2d(fine, 27, 3, padding=1),
            nn.PixelShuffle(3),
        )
        self.latent_mean: Tensor
        self.latent_std: Tensor
        self.register_buffer("latent_mean", torch.zeros(1, z, 1, 1))
        self.register_buffer("latent_std", torch.ones(1, z, 1, 1))

    def encode(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to latents (B, 12, H/6, W/6)."""
        return (self.encoder(x) - self.latent_mean) / self.latent_std

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, 12, h, w) to pictures (B, 3, 6h, 6w), about [-1, 1]."""
        return self.decoder(z * self.latent_std + self.latent_mean)
