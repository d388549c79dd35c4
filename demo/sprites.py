"""Sprites: every thing in every size, drawn once as a map of roles, to be coloured when used."""

from functools import lru_cache

import torch
from torch import Tensor

from .classes import CLASS_NAMES, KINDS, hat_layers

HALVES = (13, 17, 21)
"""Half a thing's side in pixels: small (as each of two things is), usual and big."""
WIDTH, HEIGHT = 52, 64
ROLES = (
    "none",
    "ink",
    "main",
    "main_shade",
    "second",
    "second_shade",
    "third",
    "third_shade",
    "white",
    "glass",
    "lamp",
    "nose",
)
PATTERNS = ("plain", "striped", "halves")
"""The last, the second colour from the waist down, has no word in any caption."""
HATS = 2
POSES = 2
_SHADED = 0.2


def _in_second(v: Tensor, pattern: str, waist: float) -> Tensor:
    """Where a pattern shows the second colour."""
    if pattern == "striped":
        return torch.remainder(v + 0.1, 0.56) < 0.28
    return v < waist if pattern == "halves" else torch.zeros_like(v, dtype=torch.bool)


def _draw(name: str, half: int, pattern: str, hat: bool, other: bool) -> Tensor:
    """One sprite: roles (HEIGHT, WIDTH), its lowest row on the last row of the map."""
    x = (torch.arange(WIDTH) + 0.5 - WIDTH / 2) / half
    y = (HEIGHT / 2 - 8 - torch.arange(HEIGHT) + 0.5 + 8) / half
    v, u = torch.meshgrid(y, x, indexing="ij")
    kind = KINDS[name]

    def layers(shift: float) -> list[tuple[str, Tensor]]:
        drawn = kind.draw(u, v - shift, other)
        return drawn + (hat_layers(u, v - shift, kind) if hat else [])

    second = _in_second(v, pattern, kind.waist)
    out = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    for (role, distance), (_, lower) in zip(layers(0.0), layers(_SHADED), strict=True):
        name_of_role = role.rstrip("-")
        if name_of_role == "spots":
            if pattern != "plain":
                continue
            name_of_role = "second"
        if not role.endswith("-"):
            out[distance < 1.15 / half] = ROLES.index("ink")
        inside = distance < 0
        index = ROLES.index(name_of_role)
        value = torch.full_like(out, index)
        if name_of_role in ("main", "second", "third"):
            if name_of_role == "main":
                value[second] = ROLES.index("second")
            value[lower > 0] += 1
        out[inside] = value[inside]
    rows = (out > 0).any(1).nonzero()
    return out.roll(HEIGHT - 1 - int(rows.max()), 0)


@lru_cache(maxsize=4)
def sprites(device: str = "cpu") -> Tensor:
    """All sprites as indices into ``ROLES``, uint8.

    Shape (kinds, sizes, patterns, hats, poses, HEIGHT, WIDTH).
    """
    drawn = [
        _draw(name, half, pattern, bool(hat), bool(pose))
        for name in CLASS_NAMES
        for half in HALVES
        for pattern in PATTERNS
        for hat in range(HATS)
        for pose in range(POSES)
    ]
    shape = (len(CLASS_NAMES), len(HALVES), len(PATTERNS), HATS, POSES, HEIGHT, WIDTH)
    return torch.stack(drawn).view(shape).to(device)
