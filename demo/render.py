"""The renderer: pictures and masks from ``Specs``. Batched, deterministic, on any device."""

import torch
from torch import Tensor

from .palette import FIXED, PALETTE, PENCIL, WASH
from .scenery import SHADOWS, SIDE, scenery
from .specs import GRID, SCENES, STYLES, Specs
from .sprites import HALVES, HEIGHT, ROLES, WIDTH, sprites

RESOLUTION = SIDE
_FIXED_ROLES = {"none": 0, **{name: FIXED[name] for name in ("ink", "glass", "lamp")}}
_FIXED_ROLES["white"] = FIXED["snow"]
_FIXED_ROLES["nose"] = FIXED["planet"]


_OTHER_POSE = ("beach", "forest", "space")
"""Scenes where things take their other pose. Left to chance it would be drawn as half of each."""


def _role_colors(specs: Specs, place: int) -> Tensor:
    """Palette index of every role of one place's things, (n, roles)."""
    out = torch.zeros(len(specs), len(ROLES), dtype=torch.long)
    for role, color in _FIXED_ROLES.items():
        out[:, ROLES.index(role)] = color
    for role, index in (("main", specs.color), ("second", specs.second), ("third", specs.third)):
        out[:, ROLES.index(role)] = 2 * index[:, place]
        out[:, ROLES.index(role) + 1] = 2 * index[:, place] + 1
    return out


def _drawn(picture: Tensor, things: Tensor) -> Tensor:
    """A picture (n, H, W) as a sketch: things in pencil, a light wash of what is behind them."""
    pencil, wash = PENCIL.to(picture.device), WASH.to(picture.device)
    return torch.where(things, pencil[picture], wash[picture]).to(torch.uint8)


@torch.no_grad()
def render_indices(specs: Specs, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Palette indices uint8 (n, 64, 64) and masks of both things, bool (n, 2, 64, 64)."""
    n = len(specs)
    picture = scenery(device)[specs.scene.to(device), specs.variant.to(device)].clone()
    shadows = torch.tensor([[FIXED[c] for c in SHADOWS[name]] for name in SCENES])
    shadow = shadows[specs.scene, specs.variant].to(device, torch.uint8)[:, None, None]
    pose = torch.tensor([name in _OTHER_POSE for name in SCENES]).long()[specs.scene].to(device)
    line = torch.arange(SIDE, device=device)
    rows, columns = line[None, :, None], line[None, None, :]
    masks = torch.zeros(n, 2, SIDE, SIDE, dtype=torch.bool, device=device)
    every = torch.arange(n, device=device)[:, None, None]
    for place in (1, 0):  # the first thing is in front
        size = specs.size_class[:, place]
        half = torch.tensor(HALVES)[size]
        foot = torch.where(size == 2, 62, 54 + GRID * specs.near[:, place])
        foot, half = foot.to(device)[:, None, None], half.to(device)[:, None, None]
        across = (SIDE // 2 + specs.x[:, place]).to(device)[:, None, None]
        map_ = sprites(device)[
            specs.kind[:, place].to(device),
            size.to(device),
            specs.pattern[:, place].to(device),
            specs.hat[:, place].to(device),
            pose,
        ]
        column = columns - across + WIDTH // 2
        flip = specs.flip[:, place].to(device)[:, None, None]
        column = torch.where(flip, WIDTH - 1 - column, column)
        row = rows - foot + HEIGHT
        inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
        role = map_[every, row.clamp(0, HEIGHT - 1), column.clamp(0, WIDTH - 1)].long()
        present = torch.ones(n, dtype=torch.bool) if place == 0 else specs.two
        here = present.to(device)[:, None, None]
        mask = inside & (role > 0) & here
        under = ((columns - across + 0.5) / (half * 1.05)) ** 2 + (
            (rows - foot + 0.5) / 3.0
        ) ** 2 < 1
        picture = torch.where(under & here, shadow, picture)
        colored = _role_colors(specs, place).to(device)[every, role].to(torch.uint8)
        picture = torch.where(mask, colored, picture)
        masks[:, place] = mask
    masks[:, 1] &= ~masks[:, 0]
    sketch = (specs.style == STYLES.index("sketch")).to(device)[:, None, None]
    tone = _drawn(picture.long(), masks.any(1))
    return torch.where(sketch, tone, picture), masks


def to_rgb(indices: Tensor) -> Tensor:
    """Palette indices (n, H, W) to pictures uint8 (n, 3, H, W)."""
    colors = (PALETTE * 255).round().to(torch.uint8).to(indices.device)
    return colors[indices.long()].permute(0, 3, 1, 2).contiguous()


def render(specs: Specs, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Pictures uint8 (n, 3, 64, 64) and masks of both things, float (n, 2, 64, 64), 0 or 1."""
    indices, masks = render_indices(specs, device)
    return to_rgb(indices), masks.float()
