"""Pictures that the training of the small world learns from, made anew whenever they are needed."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .render import render_indices
from .specs import Specs, sample_specs

CHUNK = 4096
TWO_SHARE = 0.45
"""Share of the pictures that show two things."""
ODD_SHARE = 0.6
"""Share of the things whose look no words can tell; what only a name tells takes longest."""
MASK_GRID = 8
_BATCH = 512


def chunk_specs(index: int, odd_share: float = ODD_SHARE) -> Specs:
    """What chunk ``index`` shows; negative indices are held out of training."""
    return sample_specs(CHUNK, 1_000_000 + index, two_share=TWO_SHARE, odd_share=odd_share)


def save_atomically(value: object, path: Path) -> None:
    """torch.save that never leaves half a file under the final name."""
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)


def load_chunk(
    index: int, device: str = "cpu", odd_share: float = ODD_SHARE
) -> tuple[Tensor, Tensor]:
    """Palette indices uint8 (4096, 64, 64) and coverage of both things, half (4096, 2, 8, 8)."""
    specs = chunk_specs(index, odd_share)
    pictures, masks = [], []
    for start in range(0, CHUNK, _BATCH):
        drawn, mask = render_indices(specs.take(slice(start, start + _BATCH)), device)
        pictures.append(drawn)
        masks.append(F.interpolate(mask.float(), size=(MASK_GRID, MASK_GRID), mode="area").half())
    return torch.cat(pictures), torch.cat(masks)
