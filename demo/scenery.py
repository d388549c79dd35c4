"""Backgrounds of the small world as maps of palette colours, four views of each scene."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from .palette import FIXED
from .shapes import both, box, circle, ellipse, triangle, union
from .specs import SCENES, VARIANTS

SIDE = 64
GROUND = 40
"""First row of the ground in scenes that have one."""


class _Canvas:
    """One background while it is painted; x and y in pixels, y downwards."""

    def __init__(self, view: int) -> None:
        line = torch.arange(SIDE) + 0.5
        self.y, self.x = torch.meshgrid(line, line, indexing="ij")
        self.left, self.other = view % 2 == 0, view // 2 == 1
        self.map = torch.zeros(SIDE, SIDE, dtype=torch.uint8)

    def paint(self, where: Tensor, color: str) -> None:
        """Colour the pixels of a mask, or those at negative distance."""
        self.map[where if where.dtype == torch.bool else where < 0] = FIXED[color]

    def side(self, across: float) -> float:
        """A place on this view's side of the picture."""
        return across if self.left else SIDE - across


def _plain(c: _Canvas) -> None:
    names = ("rose", "sky", "leaf", "grey")
    name = names[int(not c.left) + 2 * int(c.other)]
    c.paint(c.y < 48, "wall_" + name)
    c.paint(c.y >= 48, "floor_" + name)


def _beach(c: _Canvas) -> None:
    c.paint(c.y < 28, "sky")
    c.paint(circle(c.x, c.y, c.side(12), 11, 6.5), "sun")
    at = c.side(46)
    high = 12 if c.other else 16
    c.paint(
        both(
            union(
                circle(c.x, c.y, at - 5, high, 4.5),
                circle(c.x, c.y, at + 5, high, 4.5),
                circle(c.x, c.y, at, high - 3, 5.5),
            ),
            c.y - high - 3,
        ),
        "cloud",
    )
    c.paint(c.y >= 28, "sea")
    c.paint(c.y >= 38, "foam")
    c.paint(c.y >= 40, "sand")
    c.paint(c.y >= 60, "sand_shade")


def _snow(c: _Canvas) -> None:
    c.paint(c.y < GROUND, "winter_sky")
    for at, top in ((c.side(10), 8), (c.side(52 if c.other else 26), 16)):
        c.paint(both((c.x - at).abs() - 2, c.y - GROUND, 28 - c.y), "trunk")
        for k in range(3):
            high = top + k * (30 - top) / 3
            c.paint(
                triangle(c.x, c.y, (at - 8 - k, high + 11), (at + 8 + k, high + 11), (at, high)),
                "pine",
            )
        c.paint(triangle(c.x, c.y, (at - 4.5, top + 6), (at + 4.5, top + 6), (at, top)), "snow")
    c.paint(c.y >= GROUND, "snow")
    c.paint(c.y >= 58, "snow_shade")


def _forest(c: _Canvas) -> None:
    c.paint(c.y < GROUND, "leaves")
    c.paint(c.y < 6, "leaves_light")
    for at in (4, 20, 38, 56) if c.other else (8, 26, 44, 60):
        across = at if c.left else SIDE - at
        c.paint(both((c.x - across).abs() - 3, c.y - GROUND), "trunk")
        c.paint(circle(c.x, c.y, across, 6, 10), "leaves_light")
    c.paint(c.y >= GROUND, "grass")
    c.paint(c.y >= 58, "grass_shade")


def _desert(c: _Canvas) -> None:
    c.paint(c.y < 24, "dusk")
    c.paint((c.y >= 24) & (c.y < 48), "dusk_light")
    c.paint(circle(c.x, c.y, c.side(48 if c.other else 17), 22, 8.5), "sun")
    c.paint(ellipse(c.x, c.y, c.side(14), 46, 34, 14), "dune_far")
    at = 10 if c.other else 56
    c.paint(
        union(
            box(c.x, c.y, c.side(at), 30, 3, 14, 3),
            box(c.x, c.y, c.side(at + 4), 31, 5, 2, 1),
            box(c.x, c.y, c.side(at + 7.5), 27, 1.6, 5, 1.5),
            box(c.x, c.y, c.side(at - 4), 27, 5, 2, 1),
            box(c.x, c.y, c.side(at - 7.5), 23, 1.6, 5, 1.5),
        ),
        "cactus",
    )
    c.paint(c.y >= GROUND, "dune")
    c.paint(c.y >= 58, "dune_shade")


def _city(c: _Canvas) -> None:
    c.paint(c.y < GROUND, "city_sky")
    tall = (30, 18, 36, 24) if c.other else (20, 34, 16, 28)
    for k, high in enumerate(tall):
        left, top = 16 * (k if c.left else 3 - k), 44 - high
        inside = (c.x >= left) & (c.x < left + 16) & (c.y >= top) & (c.y < GROUND)
        c.paint(inside, "tower_dark" if k % 2 else "tower")
        row, column = torch.remainder(c.y - top, 8), torch.remainder(c.x - left, 8)
        lit = (row >= 3) & (row < 7) & (column >= 2) & (column < 6)
        c.paint(inside & lit, "window")
    c.paint(c.y >= GROUND, "pavement")
    c.paint(c.y >= 44, "road")
    c.paint(c.y >= 60, "road_shade")


def _space(c: _Canvas) -> None:
    c.paint(c.y >= 0, "night")
    c.paint(ellipse(c.x, c.y, c.side(44), 40, 30, 13), "nebula")
    places = (
        ((6, 30), (22, 6), (36, 14), (58, 34), (46, 56), (12, 52), (30, 46), (60, 8))
        if c.other
        else ((10, 40), (28, 10), (44, 6), (60, 26), (54, 54), (6, 58), (24, 30), (36, 60))
    )
    for across, down in places:
        at = across if c.left else SIDE - across
        c.paint((c.x - at).abs() + (c.y - down).abs() - 2.1, "star")
    at = c.side(13)
    c.paint(circle(c.x, c.y, at, 14, 8), "planet")
    c.paint(both((c.y - 14).abs() - 1.6, (c.x - at).abs() - 12.5), "ring")


_PAINTERS: dict[str, Callable[[_Canvas], None]] = {
    "plain": _plain,
    "beach": _beach,
    "snow": _snow,
    "forest": _forest,
    "desert": _desert,
    "city": _city,
    "space": _space,
}
SHADOWS = {
    "plain": ("floor_rose", "floor_sky", "floor_leaf", "floor_grey"),
    "beach": ("sand_shade",) * VARIANTS,
    "snow": ("snow_shade",) * VARIANTS,
    "forest": ("grass_shade",) * VARIANTS,
    "desert": ("dune_shade",) * VARIANTS,
    "city": ("road_shade",) * VARIANTS,
    "space": ("night",) * VARIANTS,
}


@lru_cache(maxsize=4)
def scenery(device: str = "cpu") -> Tensor:
    """All backgrounds, uint8 (scenes, VARIANTS, 64, 64), values index the palette."""
    views = []
    for name in SCENES:
        for view in range(VARIANTS):
            canvas = _Canvas(view)
            _PAINTERS[name](canvas)
            views.append(canvas.map)
    return torch.stack(views).view(len(SCENES), VARIANTS, SIDE, SIDE).to(device)
