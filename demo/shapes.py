"""Signed distance functions, batched over pictures.

Coordinates ``u`` (right) and ``v`` (up) are tensors (n, H, W); a shape is negative inside. Sizes
are in the units of the coordinates, and may be numbers or tensors that broadcast against (n, H, W).
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = float | Tensor
Point: TypeAlias = tuple[float, float]


def coverage(distance: Tensor, pixel: Number) -> Tensor:
    """Share of a pixel that lies inside: 1 inside, 0 outside, linear over one pixel."""
    return (0.5 - distance / pixel).clamp(0, 1)


def union(*shapes: Tensor) -> Tensor:
    """Points inside any of the shapes."""
    out = shapes[0]
    for shape in shapes[1:]:
        out = torch.minimum(out, shape)
    return out


def both(*shapes: Tensor) -> Tensor:
    """Points inside all of the shapes."""
    out = shapes[0]
    for shape in shapes[1:]:
        out = torch.maximum(out, shape)
    return out


def circle(u: Tensor, v: Tensor, x: Number, y: Number, radius: Number) -> Tensor:
    """Disc around (x, y)."""
    return torch.sqrt((u - x) ** 2 + (v - y) ** 2 + 1e-9) - radius


def ellipse(u: Tensor, v: Tensor, x: Number, y: Number, a: Number, b: Number) -> Tensor:
    """Ellipse with half axes a (across) and b (up); exact only near the edge."""
    scaled = torch.sqrt(((u - x) / a) ** 2 + ((v - y) / b) ** 2 + 1e-9) - 1
    return scaled * torch.minimum(
        torch.as_tensor(a, dtype=u.dtype), torch.as_tensor(b, dtype=u.dtype)
    )


def flat_ellipse(u: Tensor, v: Tensor, x: Number, y: Number, a: Number, b: Number) -> Tensor:
    """The same ellipse, also right a little way from its edge, however flat it is."""
    across, up = (u - x) / a, (v - y) / b
    out = torch.sqrt(across**2 + up**2 + 1e-9)
    return out * (out - 1) / torch.sqrt((across / a) ** 2 + (up / b) ** 2 + 1e-9)


def box(
    u: Tensor, v: Tensor, x: Number, y: Number, a: Number, b: Number, r: Number = 0.0
) -> Tensor:
    """Rectangle with half sides a and b and rounded corners of radius r."""
    dx, dy = (u - x).abs() - a + r, (v - y).abs() - b + r
    outside = torch.sqrt(dx.clamp(min=0) ** 2 + dy.clamp(min=0) ** 2 + 1e-9)
    return outside + torch.maximum(dx, dy).clamp(max=0) - r


def capsule(u: Tensor, v: Tensor, start: Point, end: Point, radius: float) -> Tensor:
    """Line from start to end, as thick as twice the radius."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = (((u - start[0]) * dx + (v - start[1]) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    gap = (u - start[0] - along * dx) ** 2 + (v - start[1] - along * dy) ** 2
    return torch.sqrt(gap + 1e-9) - radius


def triangle(u: Tensor, v: Tensor, p: Point, q: Point, r: Point) -> Tensor:
    """Triangle with the given corners, in any order."""
    if (q[0] - p[0]) * (r[1] - p[1]) < (q[1] - p[1]) * (r[0] - p[0]):
        q, r = r, q

    def edge(a: Point, b: Point) -> Tensor:
        dx, dy = b[0] - a[0], b[1] - a[1]
        return ((u - a[0]) * dy - (v - a[1]) * dx) / math.hypot(dx, dy)

    return both(edge(p, q), edge(q, r), edge(r, p))
