"""Pictures that the training of the small world learns from, made anew whenever they are needed."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .render import render_indices
from .specs import Specs, sample_specs

CHUNK = 4096
TWO_SHARE = 0.3
"""Share of the pictures that show two things."""
LATER_TWO_SHARE, LATER = 0.5, range(33, 500)
"""The same in the chunks of these numbers, which come when single things are learned; what stands
where, and looks that only names tell, take longer."""
MASK_GRID = 8
_BATCH = 512


def chunk_specs(index: int) -> Specs:
    """What chunk ``index`` shows; negative indices are held out of training."""
    two_share = LATER_TWO_SHARE if index in LATER else TWO_SHARE
    return sample_specs(CHUNK, 1_000_000 + index, two_share=two_share)


def save_atomically(value: object, path: Path) -> None:
    """torch.save that never leaves half a file under the final name."""
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)


def load_chunk(index: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Palette indices uint8 (4096, 64, 64) and coverage of both things, half (4096, 2, 8, 8)."""
    specs = chunk_specs(index)
    pictures, masks = [], []
    for start in range(0, CHUNK, _BATCH):
        drawn, mask = render_indices(specs.take(slice(start, start + _BATCH)), device)
        pictures.append(drawn)
        masks.append(F.interpolate(mask.float(), size=(MASK_GRID, MASK_GRID), mode="area").half())
    return torch.cat(pictures), torch.cat(masks)
