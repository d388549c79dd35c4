"""Pictures rendered ahead of training, in chunks on disk, so that a stopped run resumes."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .render import render
from .specs import Specs, sample_specs

CHUNK = 4096
MANY_TWO = 100
"""From this chunk on 45 % of the pictures show two things, before it 20 %."""
MASK_GRID = 12
_BATCH = 256


def chunk_specs(index: int) -> Specs:
    """What chunk ``index`` shows; negative indices are held out of training."""
    return sample_specs(CHUNK, 1_000_000 + index, two_share=0.45 if index >= MANY_TWO else 0.2)


def save_atomically(value: object, path: Path) -> None:
    """torch.save that never leaves half a file under the final name."""
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)


def load_chunk(folder: Path, index: int) -> tuple[Tensor, Tensor]:
    """Pictures uint8 (4096, 3, R, R) and coverage of both things, float (4096, 2, 12, 12)."""
    path = folder / f"pictures{index}.pt"
    if not path.exists():
        specs = chunk_specs(index)
        parts = [render(specs.take(slice(i, i + _BATCH))) for i in range(0, CHUNK, _BATCH)]
        masks = torch.cat([mask for _, mask in parts])
        coarse = F.interpolate(masks, size=(MASK_GRID, MASK_GRID), mode="area").half()
        folder.mkdir(parents=True, exist_ok=True)
        save_atomically((torch.cat([picture for picture, _ in parts]), coarse), path)
    pictures, masks = torch.load(path)
    return pictures, masks.float()
