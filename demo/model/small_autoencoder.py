"""The autoencoder of the small world: 64x64x3 pictures to 8x8x24 latents and back.

It reads any picture but draws in a fixed palette: the decoder ends in one vote per palette colour
and pixel, so what it draws has flat areas and crisp edges however vague the latents are. A picture
uses few of the palette's colours, so where its pixels are in doubt they follow the others.
"""

import torch
from torch import Tensor, nn

LATENT_CHANNELS = 24
DOWNSCALE = 8
COLORS = 87
"""Colours of the palette; the weights say which."""
_SHARPNESS = 2.0
_ROUNDS = 4
_RAREST = 1e-4
"""Added to the share of every colour in a picture."""
_FEATURES = 24


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(nn.functional.relu(self.conv1(self.norm(x))))


def color_prior(votes: Tensor) -> Tensor:
    """Log share of each colour in each picture, (B, 1, colours), from votes (B, pixels, colours).

    The maximum-likelihood estimate of class priors by expectation and maximisation (Saerens,
    Latinne and Decaestecker 2002): what is added to the votes of single pixels to
    read them in the light of the whole picture.
    """
    prior = torch.zeros_like(votes[:, :1])
    for _ in range(_ROUNDS):
        shares = (votes + prior).softmax(-1).mean(1, keepdim=True)
        prior = (shares + _RAREST).log()
    return prior


class SmallAutoencoder(nn.Module):
    """Autoencoder with the two methods ComfyUI's VAE object calls.

    The encoder is linear: the leading principal components of 8x8 patches. The decoder is what has
    to be learned; it knows the world's shapes and so finds the details that the components leave
    out. ``latent_mean`` and ``latent_std`` bring latents to mean 0 and about variance 1 over the
    training pictures, more for the first components, less for the last. ``palette`` is
    (colours, 3) in [-1, 1].
    """

    def __init__(self, coarse: int = 128, fine: int = 64, finest: int = 48) -> None:
        super().__init__()
        z = LATENT_CHANNELS
        self.encoder = nn.Conv2d(3, z, DOWNSCALE, stride=DOWNSCALE)
        self.decoder = nn.Sequential(
            nn.Conv2d(z, coarse, 3, padding=1),
            _Residual(coarse),
            _Residual(coarse),
            _Residual(coarse),
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            _Residual(fine),
            _Residual(fine),
            nn.Conv2d(fine, 4 * finest, 1),
            nn.PixelShuffle(2),
            # Which colour and which pixel multiply: what reads pixels out must not be linear on
            # more of them than it has channels for.
            _Residual(finest),
            nn.ReLU(),
            nn.Conv2d(finest, 4 * _FEATURES, 1),
            nn.PixelShuffle(2),
        )
        self.voter = nn.Linear(_FEATURES, COLORS)
        self.latent_mean: Tensor
        self.latent_std: Tensor
        self.palette: Tensor
        self.register_buffer("latent_mean", torch.zeros(1, z, 1, 1))
        self.register_buffer("latent_std", torch.ones(1, z, 1, 1))
        self.register_buffer("palette", torch.zeros(COLORS, 3))

    def encode(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to latents (B, 24, H/8, W/8)."""
        return (self.encoder(x) - self.latent_mean) / self.latent_std

    def features(self, z: Tensor) -> Tensor:
        """Latents (B, 24, h, w) to what each pixel's colour is told by, (B, 24, 8h, 8w)."""
        return self.decoder(z)

    def votes(self, z: Tensor) -> Tensor:
        """Latents (B, 24, h, w) to votes for every pixel's colour, (B, 8h, 8w, colours)."""
        votes = self.voter(self.features(z).permute(0, 2, 3, 1))
        return votes + color_prior(votes.flatten(1, 2))[:, None]

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, 24, h, w) to pictures (B, 3, 8h, 8w) in [-1, 1]."""
        shares = (self.votes(z) * _SHARPNESS).softmax(-1)
        return (shares @ self.palette.to(shares.dtype)).permute(0, 3, 1, 2)
