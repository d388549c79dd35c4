"""The kinds of things in the small world: how each is drawn, as layers of signed distances.

A thing lives in u, v in [-1, 1] (v up). Each layer has a role: "main" carries the pattern, "second"
the second colour, any other role a fixed colour of ``ROLE_COLORS``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .shapes import both, box, capsule, circle, ellipse, triangle, union

ROLE_COLORS = {
    "dark": (0.13, 0.12, 0.15),
    "glass": (0.66, 0.86, 0.96),
    "light": (0.97, 0.97, 0.97),
    "lamp": (1.0, 0.87, 0.35),
    "nose": (0.98, 0.55, 0.5),
    "wood": (0.42, 0.27, 0.15),
    "cream": (0.96, 0.91, 0.8),
}

Layers = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Anchors:
    """Where marks sit: face (x, y, scale), horn (x, y, scale), emblem (x, y, radius)."""

    face: tuple[float, float, float]
    horn: tuple[float, float, float]
    emblem: tuple[float, float, float]


@dataclass(frozen=True)
class Kind:
    """A class of things: its words, its usual colour, how it is drawn and where marks sit."""

    words: tuple[str, ...]
    usual_color: str
    draw: Callable[[Tensor, Tensor], Layers]
    anchors: Anchors


def _mug(u: Tensor, v: Tensor) -> Layers:
    return [
        ("second", circle(u, v, 0.55, 0.0, 0.32).abs() - 0.1),
        ("main", box(u, v, -0.1, -0.05, 0.56, 0.72, 0.14)),
        ("dark", ellipse(u, v, -0.1, 0.62, 0.5, 0.12)),
    ]


def _teddy(u: Tensor, v: Tensor) -> Layers:
    return [
        ("main", union(circle(u, v, -0.4, 0.76, 0.23), circle(u, v, 0.4, 0.76, 0.23))),
        (
            "main",
            union(ellipse(u, v, -0.36, -0.82, 0.26, 0.18), ellipse(u, v, 0.36, -0.82, 0.26, 0.18)),
        ),
        (
            "main",
            union(
                capsule(u, v, (-0.35, -0.1), (-0.74, -0.36), 0.16),
                capsule(u, v, (0.35, -0.1), (0.74, -0.36), 0.16),
            ),
        ),
        ("main", ellipse(u, v, 0, -0.4, 0.52, 0.52)),
        ("main", circle(u, v, 0, 0.4, 0.5)),
        ("second", ellipse(u, v, 0, -0.44, 0.33, 0.34)),
        ("second", ellipse(u, v, 0, 0.22, 0.24, 0.18)),
        (
            "dark",
            union(
                circle(u, v, -0.19, 0.5, 0.08),
                circle(u, v, 0.19, 0.5, 0.08),
                ellipse(u, v, 0, 0.28, 0.1, 0.08),
            ),
        ),
    ]


def _cat(u: Tensor, v: Tensor) -> Layers:
    return [
        ("second", capsule(u, v, (0.4, -0.72), (0.84, -0.3), 0.11)),
        ("second", capsule(u, v, (0.84, -0.3), (0.78, 0.12), 0.11)),
        ("main", ellipse(u, v, 0, -0.42, 0.5, 0.56)),
        (
            "main",
            union(
                triangle(u, v, (-0.56, 0.98), (-0.52, 0.34), (-0.06, 0.66)),
                triangle(u, v, (0.56, 0.98), (0.52, 0.34), (0.06, 0.66)),
            ),
        ),
        ("main", ellipse(u, v, 0, 0.36, 0.56, 0.43)),
        ("second", ellipse(u, v, 0, -0.55, 0.28, 0.36)),
        (
            "dark",
            union(ellipse(u, v, -0.22, 0.44, 0.09, 0.12), ellipse(u, v, 0.22, 0.44, 0.09, 0.12)),
        ),
        ("nose", triangle(u, v, (-0.11, 0.3), (0.11, 0.3), (0, 0.16))),
    ]


def _car(u: Tensor, v: Tensor) -> Layers:
    return [
        ("second", both(box(u, v, -0.05, 0.2, 0.6, 0.42, 0.2), -(v + 0.2))),
        (
            "glass",
            union(box(u, v, -0.32, 0.25, 0.2, 0.2, 0.05), box(u, v, 0.2, 0.25, 0.2, 0.2, 0.05)),
        ),
        ("main", box(u, v, 0, -0.18, 0.96, 0.3, 0.15)),
        ("dark", union(circle(u, v, -0.52, -0.47, 0.27), circle(u, v, 0.52, -0.47, 0.27))),
        ("light", union(circle(u, v, -0.52, -0.47, 0.11), circle(u, v, 0.52, -0.47, 0.11))),
        ("lamp", circle(u, v, 0.87, -0.12, 0.09)),
    ]


def _house(u: Tensor, v: Tensor) -> Layers:
    return [
        ("dark", box(u, v, 0.45, 0.62, 0.12, 0.28)),
        ("main", box(u, v, 0, -0.36, 0.68, 0.56)),
        ("second", triangle(u, v, (-0.95, 0.14), (0.95, 0.14), (0, 0.86))),
        ("wood", box(u, v, -0.3, -0.6, 0.18, 0.32)),
        ("lamp", box(u, v, 0.28, -0.32, 0.2, 0.2)),
        ("dark", union(box(u, v, 0.28, -0.32, 0.03, 0.2), box(u, v, 0.28, -0.32, 0.2, 0.03))),
    ]


def _robot(u: Tensor, v: Tensor) -> Layers:
    return [
        ("dark", capsule(u, v, (0, 0.7), (0, 0.9), 0.05)),
        ("second", circle(u, v, 0, 0.92, 0.1)),
        ("dark", union(box(u, v, -0.26, -0.82, 0.14, 0.18), box(u, v, 0.26, -0.82, 0.14, 0.18))),
        (
            "second",
            union(
                box(u, v, -0.7, -0.24, 0.12, 0.34, 0.08), box(u, v, 0.7, -0.24, 0.12, 0.34, 0.08)
            ),
        ),
        ("main", box(u, v, 0, -0.24, 0.54, 0.46, 0.08)),
        ("main", box(u, v, 0, 0.46, 0.48, 0.3, 0.1)),
        ("lamp", union(circle(u, v, -0.2, 0.52, 0.12), circle(u, v, 0.2, 0.52, 0.12))),
        ("dark", box(u, v, 0, 0.29, 0.22, 0.045)),
    ]


def _fish(u: Tensor, v: Tensor) -> Layers:
    return [
        ("second", triangle(u, v, (-0.4, 0), (-0.98, 0.5), (-0.98, -0.5))),
        ("second", triangle(u, v, (-0.25, 0.3), (0.35, 0.35), (-0.2, 0.8))),
        ("main", ellipse(u, v, 0.14, 0, 0.74, 0.5)),
        ("light", circle(u, v, 0.52, 0.12, 0.15)),
        ("dark", circle(u, v, 0.56, 0.12, 0.08)),
        ("second", triangle(u, v, (0.1, -0.02), (-0.24, -0.3), (-0.24, 0.2))),
    ]


def _mushroom(u: Tensor, v: Tensor) -> Layers:
    return [
        ("cream", box(u, v, 0, -0.52, 0.27, 0.44, 0.14)),
        ("main", both(ellipse(u, v, 0, -0.12, 0.92, 0.95), -(v + 0.12))),
        ("second", both(ellipse(u, v, 0, -0.12, 0.92, 0.2), v + 0.1)),
    ]


KINDS: dict[str, Kind] = {
    "mug": Kind(
        ("mug", "cup"),
        "white",
        _mug,
        Anchors((-0.1, 0.12, 0.6), (-0.1, 0.7, 1.0), (-0.1, -0.38, 0.27)),
    ),
    "teddy": Kind(
        ("teddy", "bear"),
        "pink",
        _teddy,
        Anchors((0, 0.46, 0.55), (0, 0.84, 0.9), (0, -0.46, 0.27)),
    ),
    "cat": Kind(
        ("cat", "kitten"), "orange", _cat, Anchors((0, 0.42, 0.6), (0, 0.76, 0.9), (0, -0.52, 0.27))
    ),
    "car": Kind(
        ("car", "automobile"),
        "red",
        _car,
        Anchors((0.0, -0.06, 0.5), (-0.05, 0.55, 0.9), (0, -0.17, 0.24)),
    ),
    "house": Kind(
        ("house", "cottage"),
        "yellow",
        _house,
        Anchors((0, -0.14, 0.6), (0, 0.78, 0.9), (0, 0.38, 0.22)),
    ),
    "robot": Kind(
        ("robot", "android"),
        "blue",
        _robot,
        Anchors((0, 0.5, 0.55), (0, 0.74, 0.9), (0, -0.26, 0.28)),
    ),
    "fish": Kind(
        ("fish",), "green", _fish, Anchors((0.36, 0.05, 0.5), (0.25, 0.45, 0.9), (0.0, -0.1, 0.25))
    ),
    "mushroom": Kind(
        ("mushroom",), "red", _mushroom, Anchors((0, 0.3, 0.62), (0, 0.76, 1.0), (0, -0.54, 0.2))
    ),
}
CLASS_NAMES = tuple(KINDS)
