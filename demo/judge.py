"""The judge: a small network that reads off a picture what it shows, trained on renderings only."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .classes import CLASS_NAMES
from .specs import ALL_COLORS, SCENES, STYLES
from .sprites import HALVES, HATS, PATTERNS

HEADS = {
    "kind": len(CLASS_NAMES),  # several may be present: one yes or no each
    "scene": len(SCENES),
    "style": len(STYLES),
    "color": len(ALL_COLORS),
    "second": len(ALL_COLORS),
    "third": len(ALL_COLORS),
    "pattern": len(PATTERNS),
    "hat": HATS,
    "size_class": len(HALVES),
}
OF_COLOR = ("color", "second", "third", "pattern")
"""What a pencil drawing does not show."""
INSTANCE_WIDTH = 48


class _Block(nn.Module):
    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, narrow), nn.GroupNorm(8, wide)
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, 1)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1)
        self.skip = nn.Conv2d(narrow, wide, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.relu(self.norm2(h)))


class Judge(nn.Module):
    """Attribute heads and an instance embedding over one convolutional trunk."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        w = width
        self.trunk = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, w, 3, 1, 1),
            _Block(w, 2 * w, 2),
            _Block(2 * w, 2 * w, 1),
            _Block(2 * w, 4 * w, 2),
            _Block(4 * w, 4 * w, 1),
            nn.GroupNorm(8, 4 * w),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(8 * w, size) for name, size in HEADS.items()})
        self.instance = nn.Sequential(
            nn.Linear(8 * w, 128), nn.SiLU(), nn.Linear(128, INSTANCE_WIDTH)
        )

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] to (B, 8 width)."""
        h = self.trunk(x)
        return torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)

    def read(self, features: Tensor) -> dict[str, Tensor]:
        """Logits (B, n) of every head."""
        return {name: head(features) for name, head in self.heads.items()}

    def embed(self, features: Tensor) -> Tensor:
        """Unit vectors (B, 48): alike for the same thing, wherever it stands."""
        return F.normalize(self.instance(features), dim=-1)


def load_judge(path: Path) -> Judge:
    """The judge from its weight file."""
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return judge.train(False).requires_grad_(False)
