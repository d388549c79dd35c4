"""Backgrounds of the small world as maps of palette colours, eight views of each scene."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from .palette import FIXED
from .shapes import both, box, capsule, circle, ellipse, triangle, union
from .specs import SCENES, VARIANTS

SIDE = 64
GROUND = 40
"""First row of the ground in scenes that have one."""
_ROOMS = ("rose", "sky", "leaf", "rose")
"""The colour of the room in each two views of a plain scene, one the mirror image of the other."""


class _Canvas:
    """One background while it is painted; x and y in pixels, y downwards."""

    def __init__(self, view: int) -> None:
        line = torch.arange(SIDE) + 0.5
        self.y, self.x = torch.meshgrid(line, line, indexing="ij")
        if view % 2:  # views come in pairs, each the mirror image of the other
            self.x = SIDE - self.x
        self.view = view // 2
        self.map = torch.zeros(SIDE, SIDE, dtype=torch.uint8)

    def paint(self, where: Tensor, color: str) -> None:
        """Colour the pixels of a mask, or those at negative distance."""
        self.map[where if where.dtype == torch.bool else where < 0] = FIXED[color]

    def dots(self, places: tuple[tuple[int, int], ...], color: str, wide: int, high: int) -> None:
        """Small rectangles with their upper left corners at these places."""
        for left, top in places:
            inside = (self.x > left) & (self.x < left + wide)
            self.paint(inside & (self.y > top) & (self.y < top + high), color)

    def cloud(self, at: float, high: float, color: str = "cloud") -> None:
        """A flat-bottomed cloud, 19 pixels wide, with its base 3 below ``high``."""
        puffs = (
            circle(self.x, self.y, at - 5, high, 4.5),
            circle(self.x, self.y, at + 5, high, 4.5),
            circle(self.x, self.y, at, high - 3, 5.5),
        )
        self.paint(both(union(*puffs), self.y - high - 3), color)


def _plain(c: _Canvas) -> None:
    name = _ROOMS[c.view]
    wall, floor, shade = "wall_" + name, "floor_" + name, "shade_" + name
    c.paint(c.y >= 0, wall)
    if c.view % 2:
        c.paint(torch.remainder(c.x, 16) < 3, floor)
    at, high = ((10, 15), (54, 15), (11, 16), (53, 14))[c.view]
    if c.view < 2:  # a window
        c.paint(box(c.x, c.y, at, high, 8, 9), "snow")
        c.paint(box(c.x, c.y, at, high, 6, 7), "sky")
        c.paint(circle(c.x, c.y, at + 3, high - 2, 2.5), "sun")
        c.paint(
            both(ellipse(c.x, c.y, at - 3, high + 9, 9, 6), box(c.x, c.y, at, high, 6, 7)), "grass"
        )
        c.paint(both((c.x - at).abs() - 1, (c.y - high).abs() - 7), "snow")
        c.paint(box(c.x, c.y, at, high + 10, 10, 1), "shade_" + name)
    else:  # a picture
        c.paint(box(c.x, c.y, at, high, 9, 7), "trunk")
        c.paint(box(c.x, c.y, at, high, 7, 5), "paper")
        c.paint(
            triangle(c.x, c.y, (at - 6, high + 5), (at + 4, high + 5), (at - 1, high - 3)), "tower"
        )
        c.paint(circle(c.x, c.y, at + 4, high - 2, 1.6), "planet")
    c.paint(c.y >= 44, shade)
    c.paint(c.y >= 46, floor)
    c.paint(ellipse(c.x, c.y, 32, 57, 27, 6), wall)  # a rug


def _beach(c: _Canvas) -> None:
    c.paint(c.y < 28, "sky")
    c.paint(circle(c.x, c.y, 12, 11, 6.5), "sun")
    c.cloud(46, (16, 12, 14, 11)[c.view])
    if c.view == 2:
        c.paint(both(ellipse(c.x, c.y, 52, 29, 14, 7), c.y - 28), "cactus")
    if c.view == 3:
        c.cloud(26, 20)
    c.paint(c.y >= 28, "sea")
    waves = ((4, 31), (20, 34), (36, 31), (50, 34), (58, 30))
    c.dots(waves, "sky", 5, 1)
    if c.view == 1:
        c.paint(triangle(c.x, c.y, (50, 31), (50, 17), (60, 31)), "snow")
        c.paint(triangle(c.x, c.y, (48, 31), (48, 20), (41, 31)), "cloud")
        c.paint(both(ellipse(c.x, c.y, 50, 32, 10, 5), 32 - c.y), "trunk")
    c.paint(c.y >= 38, "foam")
    c.paint(c.y >= 40, "sand")
    c.dots(((6, 46), (22, 43), (44, 44), (58, 49), (5, 57), (58, 58)), "sand_shade", 2, 1)
    if c.view in (0, 3):
        c.paint(capsule(c.x, c.y, (59, 47), (56, 24), 1.7), "trunk")
        for tip, bend in (((45, 27), (50, 20)), ((66, 28), (62, 20)), ((49, 16), (53, 18))):
            c.paint(capsule(c.x, c.y, (56, 23), bend, 2), "cactus")
            c.paint(capsule(c.x, c.y, bend, tip, 1.7), "cactus")


def _pine(c: _Canvas, at: float, top: float, color: str = "pine") -> None:
    c.paint(both((c.x - at).abs() - 2, c.y - GROUND - 2, 28 - c.y), "trunk")
    for k in range(3):
        high = top + k * (30 - top) / 3
        left, right = (at - 8 - k, high + 11), (at + 8 + k, high + 11)
        c.paint(triangle(c.x, c.y, left, right, (at, high)), color)
    c.paint(triangle(c.x, c.y, (at - 4.5, top + 6), (at + 4.5, top + 6), (at, top)), "snow")


def _snow(c: _Canvas) -> None:
    c.paint(c.y < 48, "winter_sky")
    flakes = ((4, 5), (20, 12), (32, 4), (44, 10), (60, 6), (26, 24), (50, 22), (38, 16), (8, 26))
    c.dots(flakes, "snow", 2, 2)
    c.paint(ellipse(c.x, c.y, (50, 14, 32, 56)[c.view], 44, 30, 12), "snow_shade")
    for at, top in (
        ((9, 8), (26, 18)),
        ((8, 14), (56, 8)),
        ((55, 16), (7, 20)),
        ((10, 6), (57, 20)),
    )[c.view]:
        _pine(c, at, top)
    c.paint(c.y >= GROUND + 1, "snow")
    c.dots(((6, 47), (24, 44), (46, 45), (58, 52), (4, 58)), "snow_shade", 3, 1)


def _forest(c: _Canvas) -> None:
    c.paint(c.y < GROUND, "leaves_light")
    for k, top in enumerate(((14, 8, 16, 10, 15), (9, 16, 11, 15, 7))[c.view % 2]):
        at = 4 + 14 * k
        c.paint(triangle(c.x, c.y, (at - 10, 42), (at + 10, 42), (at, top)), "leaves")
    c.paint(c.y >= GROUND, "grass")
    for at in ((2, 16, 54), (12, 48, 62), (4, 40, 58), (8, 24, 60))[c.view]:
        c.paint(both(ellipse(c.x, c.y, at, 40, 8, 6), c.y - 43), "grass_shade")
    if c.view == 2:  # a path
        c.paint(both(triangle(c.x, c.y, (14, 72), (58, 72), (34, 36)), 43 - c.y), "sand")
    elif c.view == 3:  # flowers
        c.dots(((6, 50), (26, 45), (44, 46), (60, 58), (4, 60), (52, 52)), "star", 2, 2)
    for at in ((9,), (56,), (5, 59), (54,))[c.view]:
        c.paint(both((c.x - at).abs() - 2.6, c.y - 46), "trunk")
        for across, down, wide in ((-5, 6, 7), (6, 5, 7.5), (0, 12, 7)):
            c.paint(circle(c.x, c.y, at + across, down, wide), "grass_shade")
        c.paint(circle(c.x, c.y, at - 2, 4, 6), "grass")
    c.dots(((20, 46), (36, 44), (46, 48), (4, 52), (60, 55), (12, 60)), "grass_shade", 2, 1)


def _desert(c: _Canvas) -> None:
    c.paint(c.y < 24, "dusk")
    c.paint((c.y >= 24) & (c.y < 48), "dusk_light")
    c.paint(circle(c.x, c.y, (17, 48, 14, 50)[c.view], 16, 8.5), "sun")
    for at, wide, top in (
        ((44, 9, 24), (60, 6, 30)),
        ((10, 8, 26), (26, 5, 32)),
        ((56, 10, 22),),
        ((6, 9, 24), (34, 6, 31)),
    )[c.view]:
        c.paint(both((c.x - at).abs() - wide - (c.y - top) / 4, top - c.y), "dune_far")
    c.paint(ellipse(c.x, c.y, (14, 46, 20, 40)[c.view], 46, 34, 10), "dune")
    for at in ((56,), (9,), (8, 57), (55,))[c.view]:
        c.paint(
            union(
                box(c.x, c.y, at, 33, 3, 14, 3),
                box(c.x, c.y, at + 4, 34, 5, 2, 1),
                box(c.x, c.y, at + 7.5, 30, 1.6, 5, 1.5),
                box(c.x, c.y, at - 4, 30, 5, 2, 1),
                box(c.x, c.y, at - 7.5, 26, 1.6, 5, 1.5),
            ),
            "cactus",
        )
    c.paint(c.y >= 44, "dune")
    c.dots(((6, 50), (24, 47), (46, 48), (58, 54), (5, 59)), "dune_shade", 3, 1)


def _city(c: _Canvas) -> None:
    c.paint(c.y < GROUND, "city_sky")
    c.cloud((48, 14, 30, 52)[c.view], 9, "cloud")
    tall = ((20, 34, 16, 28), (30, 18, 36, 24), (26, 14, 22, 35), (36, 24, 13, 20))[c.view]
    for k, high in enumerate(tall):
        left, top = 16 * k, 44 - high
        inside = (c.x >= left) & (c.x < left + 16) & (c.y >= top) & (c.y < GROUND)
        c.paint(inside, "tower_dark" if k % 2 else "tower")
        row, column = torch.remainder(c.y - top, 8), torch.remainder(c.x - left, 8)
        lit = (row >= 3) & (row < 7) & (column >= 2) & (column < 6)
        c.paint(inside & lit, "window")
    c.paint(c.y >= GROUND, "floor_sky")
    c.paint(c.y >= 43, "road")
    dashes = torch.remainder(c.x + 4, 16) < 8
    c.paint(dashes & (c.y >= 47) & (c.y < 49), "window")


def _space(c: _Canvas) -> None:
    c.paint(c.y >= 0, "night")
    slope = (0.3, -0.25, 0.2, -0.3)[c.view]
    way = c.y - (22, 16, 10, 26)[c.view] - slope * (c.x - 32)
    c.paint(way.abs() - 3.5 - 1.5 * torch.sin(c.x / 5), "nebula")
    at, high = ((11, 10), (53, 9), (12, 11), (52, 10))[c.view]
    stars = ((4, 36), (28, 4), (44, 26), (60, 30), (38, 10), (20, 26), (58, 4), (4, 4))
    c.dots(tuple(p for p in stars if abs(p[0] - at) > 13), "star", 2, 2)
    few = ((33, 18), (8, 30), (46, 5), (55, 22), (24, 12), (61, 14), (16, 5), (40, 31))
    c.dots(tuple(p for p in few if abs(p[0] - at) > 13), "star", 1, 1)
    c.paint(circle(c.x, c.y, at, high, 6), "planet")
    tilted = c.y - high + 0.35 * (c.x - at)
    ring = (((c.x - at) / 10.5) ** 2 + (tilted / 3) ** 2).sqrt()
    c.paint((ring > 0.68) & (ring < 1.02) & ((tilted > 0) | ((c.x - at).abs() > 5.5)), "ring")
    c.paint(c.y >= GROUND + 2 + torch.cos((c.x - 32) / 10), "nebula")
    for across, down, wide in ((8, 48, 6), (50, 46, 5), (58, 57, 6), (28, 45, 3), (6, 60, 5)):
        c.paint(ellipse(c.x, c.y, across, down, wide, wide / 2.6), "night")


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
    "plain": tuple(f"shade_{name}" for name in _ROOMS for _ in range(2)),
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
