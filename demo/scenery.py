"""Backgrounds of the small world, one function a scene."""

from collections.abc import Callable

import torch
from torch import Tensor

from .shapes import both, box, circle, coverage, triangle, union
from .specs import SCENES, hsv_to_rgb

Color = tuple[float, float, float]


def over(picture: Tensor, cover: Tensor, color: Tensor | Color) -> Tensor:
    """Paint a colour on ``picture`` (n, 3, H, W) where ``cover`` (n, H, W) says so.

    The colour is (n, 3, H, W), (n, 3) or one RGB triple.
    """
    if not isinstance(color, Tensor):
        color = torch.tensor(color).view(1, 3, 1, 1)
    elif color.dim() == 2:
        color = color[:, :, None, None]
    share = cover[:, None]
    return picture * (1 - share) + color * share


class _Canvas:
    """One scene's picture while it is painted: coordinates, random numbers p, horizon."""

    def __init__(self, x: Tensor, y: Tensor, p: Tensor, horizon: Tensor) -> None:
        self.n, self.p, self.horizon = len(p), p, horizon
        self.x, self.y = x.expand(self.n, -1, -1), y.expand(self.n, -1, -1)
        self.pixel = 2 / x.shape[-1]
        self.picture = torch.zeros(self.n, 3, *x.shape[-2:])

    def number(self, i: int) -> Tensor:
        return self.p[:, i % 10, None, None]

    def between(self, a: Color, b: Color, i: int) -> Tensor:
        """A colour (n, 3) between two, by random number i."""
        low, high = torch.tensor(a), torch.tensor(b)
        return low + (high - low) * self.p[:, i % 10, None]

    def sky(self, top: Tensor, bottom: Tensor) -> None:
        share = ((self.y + 1) / (self.horizon + 1)).clamp(0, 1)[:, None]
        self.picture = top[:, :, None, None] * (1 - share) + bottom[:, :, None, None] * share

    def paint(self, distance: Tensor, color: Tensor | Color) -> None:
        self.picture = over(self.picture, coverage(distance, self.pixel), color)


def _plain(c: _Canvas) -> None:
    faint = 0.28 * c.p[:, 1] * (c.p[:, 3] > 0.3)
    wall = hsv_to_rgb(c.p[:, 0], faint, 0.62 + 0.36 * c.p[:, 2])
    c.sky(wall, wall)


def _beach(c: _Canvas) -> None:
    c.sky(
        c.between((0.4, 0.7, 0.96), (0.5, 0.78, 1.0), 0),
        c.between((0.8, 0.92, 1.0), (0.9, 0.95, 1.0), 0),
    )
    shore = c.horizon + 0.26 + 0.05 * torch.sin(c.x * 4 + c.number(3) * 6)
    c.paint(c.horizon - c.y, c.between((0.05, 0.42, 0.68), (0.1, 0.55, 0.78), 1))
    c.paint(shore - 0.06 - c.y, (0.97, 0.98, 0.98))
    c.paint(shore - c.y, c.between((0.92, 0.8, 0.54), (0.97, 0.87, 0.64), 2))
    c.paint(circle(c.x, c.y, c.number(5) * 1.6 - 0.8, -0.72, 0.15), (1.0, 0.93, 0.45))


def _snow(c: _Canvas) -> None:
    c.sky(
        c.between((0.62, 0.72, 0.86), (0.72, 0.8, 0.9), 0),
        c.between((0.86, 0.9, 0.96), (0.93, 0.95, 1.0), 0),
    )
    for k in range(2):
        across, foot = c.number(3 + k) * 1.8 - 0.9, c.horizon + 0.04
        for width, top in ((0.24, 0.45), (0.17, 0.68)):
            inside = both(
                c.y - foot,
                foot - top - c.y,
                (c.x - across).abs() - width * (c.y - foot + top) / top,
            )
            c.paint(inside, c.between((0.2, 0.42, 0.36), (0.25, 0.5, 0.42), 6))
    c.paint(
        c.horizon + 0.05 * torch.sin(c.x * 3 + c.number(2) * 6) - c.y,
        c.between((0.93, 0.95, 0.99), (0.98, 0.99, 1.0), 7),
    )


def _forest(c: _Canvas) -> None:
    c.sky(
        c.between((0.16, 0.38, 0.2), (0.24, 0.46, 0.24), 0),
        c.between((0.3, 0.52, 0.28), (0.4, 0.6, 0.34), 1),
    )
    for k in range(4):
        across = -0.84 + 0.56 * k + 0.3 * (c.number(2 + k) - 0.5)
        c.paint(
            both((c.x - across).abs() - 0.07 - 0.04 * c.number(k + 5), c.y - c.horizon - 0.05),
            c.between((0.28, 0.19, 0.1), (0.38, 0.27, 0.16), k + 3),
        )
    c.paint(
        c.y + 0.62 + 0.12 * torch.sin(c.x * 7 + c.number(8) * 6),
        c.between((0.1, 0.32, 0.12), (0.18, 0.42, 0.16), 4),
    )
    c.paint(c.horizon - c.y, c.between((0.22, 0.34, 0.12), (0.32, 0.42, 0.16), 9))


def _desert(c: _Canvas) -> None:
    c.sky(
        c.between((0.98, 0.72, 0.45), (1.0, 0.8, 0.55), 0),
        c.between((1.0, 0.88, 0.66), (1.0, 0.92, 0.75), 1),
    )
    c.paint(
        c.horizon - 0.16 + 0.14 * torch.sin(c.x * 2 + c.number(4) * 6) - c.y,
        c.between((0.82, 0.5, 0.26), (0.88, 0.57, 0.3), 5),
    )
    c.paint(
        c.horizon + 0.05 * torch.sin(c.x * 2.7 + c.number(6) * 6) - c.y,
        c.between((0.9, 0.64, 0.36), (0.95, 0.7, 0.42), 7),
    )
    across = torch.where(c.number(8) > 0.5, 0.45 + 0.4 * c.number(8), -0.9 + 0.5 * c.number(8))
    x, y = c.x - across, c.y - c.horizon
    cactus = union(
        both(x.abs() - 0.07, (y + 0.2).abs() - 0.3),
        box(x, y, 0.12, -0.2, 0.12, 0.045),
        box(x, y, 0.21, -0.28, 0.05, 0.12),
    )
    c.paint(cactus, c.between((0.2, 0.45, 0.22), (0.25, 0.55, 0.28), 3))


def _city(c: _Canvas) -> None:
    c.sky(
        c.between((0.62, 0.72, 0.84), (0.72, 0.8, 0.88), 0),
        c.between((0.85, 0.87, 0.9), (0.92, 0.92, 0.92), 1),
    )
    for k in range(5):
        across = -0.88 + 0.44 * k + 0.08 * (c.number(k * 3) - 0.5)
        tall = 0.4 + 0.8 * c.number(k * 7 + 2)
        grey = 0.36 + 0.3 * c.number(k * 5 + 1)[:, :, 0]
        house = box(c.x, c.y, across, c.horizon - tall / 2, 0.19, tall / 2)
        c.paint(house, torch.cat([grey * 0.92, grey, grey * 1.12], 1))
        windows = both(
            house + 0.06,
            0.3 - torch.sin((c.x - across) * 26 + 1.57) * torch.sin((c.y - c.horizon) * 21),
        )
        c.picture = over(
            c.picture,
            torch.sigmoid(-windows * 14) * coverage(house + 0.05, c.pixel),
            (0.96, 0.88, 0.55),
        )
    c.paint(c.horizon - c.y, (0.66, 0.66, 0.67))
    c.paint(c.horizon + 0.13 - c.y, c.between((0.27, 0.27, 0.3), (0.34, 0.34, 0.37), 9))


def _space(c: _Canvas) -> None:
    c.sky(
        c.between((0.03, 0.03, 0.1), (0.09, 0.04, 0.18), 0),
        c.between((0.05, 0.04, 0.16), (0.04, 0.08, 0.2), 1),
    )
    for k in range(12):
        at_x = torch.frac(c.number(k) * (3.7 + k) + 0.13 * k) * 2 - 1
        at_y = torch.frac(c.number(k + 3) * (5.3 + k) + 0.29 * k) * 2 - 1
        c.paint(circle(c.x, c.y, at_x, at_y, 0.028), (0.96, 0.96, 1.0))
    across = torch.where(c.number(8) > 0.5, 0.35 + 0.5 * c.number(8), -0.85 + 0.6 * c.number(8))
    tint = hsv_to_rgb(c.p[:, 3], torch.full_like(c.p[:, 3], 0.45), torch.full_like(c.p[:, 3], 0.8))
    c.paint(circle(c.x, c.y, across, -0.6, 0.24), tint)
    c.paint(
        triangle(c.x - across, c.y + 0.6, (-0.4, 0.1), (0.4, -0.14), (0.4, -0.06)), (0.9, 0.86, 0.7)
    )


_PAINTERS: dict[str, Callable[[_Canvas], None]] = {
    "plain": _plain,
    "beach": _beach,
    "snow": _snow,
    "forest": _forest,
    "desert": _desert,
    "city": _city,
    "space": _space,
}


def paint_scenes(
    scene: Tensor, parameters: Tensor, horizon: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    """Backgrounds (n, 3, H, W) in [0, 1].

    ``scene`` (n,) indexes ``SCENES``, ``parameters`` is (n, 10) in [0, 1), ``horizon`` (n,) where
    the sky ends; x and y (1, H, W) run over [-1, 1], y downwards.
    """
    out = torch.empty(len(scene), 3, *x.shape[-2:])
    for index, name in enumerate(SCENES):
        rows = (scene == index).nonzero()[:, 0]
        if len(rows):
            canvas = _Canvas(x, y, parameters[rows], horizon[rows, None, None])
            _PAINTERS[name](canvas)
            out[rows] = canvas.picture
    return out
