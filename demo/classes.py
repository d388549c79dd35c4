"""The kinds of things in the small world: how each is drawn, as layers of signed distances.

A thing lives in u, v in [-1, 1] (v up) and is a few big parts. Each layer has a role: "main" has
the pattern, "main", "second" and "third" take the thing's own colours, "spots" the second one where
there is no pattern; other roles are fixed.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .shapes import both, box, capsule, circle, ellipse, flat_ellipse, triangle, union

Layers = list[tuple[str, Tensor]]
"""(role, distance) from back to front; a role that ends in "-" has no outline."""


@dataclass(frozen=True)
class Kind:
    """A class of things: its words, usual colours, how it is drawn, where a hat and a waist are.

    ``draw`` takes u, v and whether to draw the other of two poses.
    """

    words: tuple[str, ...]
    usual_colors: tuple[str, str, str]
    draw: Callable[[Tensor, Tensor, bool], Layers]
    hat: tuple[float, float]
    waist: float


def _eyes(u: Tensor, v: Tensor, across: float, up: float, size: float = 0.1) -> Tensor:
    return union(
        ellipse(u, v, -across, up, size, size * 1.25), ellipse(u, v, across, up, size, size * 1.25)
    )


def _mug(u: Tensor, v: Tensor, other: bool) -> Layers:
    return [
        ("second", ellipse(u, v, 0.58, -0.05, 0.36, 0.46).abs() - 0.12),
        ("main", box(u, v, -0.18, -0.08, 0.64, 0.8, 0.18)),
        ("main", flat_ellipse(u, v, -0.18, 0.72, 0.64, 0.22)),
        ("third-", flat_ellipse(u, v, -0.18, 0.72, 0.54, 0.13)),
    ]


def _teddy(u: Tensor, v: Tensor, other: bool) -> Layers:
    return [
        ("third", union(circle(u, v, -0.5, 0.8, 0.25), circle(u, v, 0.5, 0.8, 0.25))),
        (
            "main",
            union(
                capsule(u, v, (-0.35, -0.12), (-0.74, -0.34), 0.17),
                capsule(u, v, (0.35, -0.12), (0.74, -0.34), 0.17),
            ),
        ),
        (
            "third",
            union(ellipse(u, v, -0.42, -0.8, 0.3, 0.22), ellipse(u, v, 0.42, -0.8, 0.3, 0.22)),
        ),
        ("main", ellipse(u, v, 0, -0.42, 0.55, 0.54)),
        ("second-", ellipse(u, v, 0, -0.44, 0.34, 0.36)),
        ("main", ellipse(u, v, 0, 0.42, 0.62, 0.5)),
        ("second-", ellipse(u, v, 0, 0.2, 0.28, 0.22)),
        ("ink-", union(_eyes(u, v, 0.27, 0.5), ellipse(u, v, 0, 0.28, 0.13, 0.09))),
    ]


def _cat(u: Tensor, v: Tensor, other: bool) -> Layers:
    ears = union(
        triangle(u, v, (-0.68, 1.0), (-0.62, 0.3), (-0.06, 0.62)),
        triangle(u, v, (0.68, 1.0), (0.62, 0.3), (0.06, 0.62)),
    )
    inner = union(
        triangle(u, v, (-0.6, 0.86), (-0.58, 0.4), (-0.2, 0.64)),
        triangle(u, v, (0.6, 0.86), (0.58, 0.4), (0.2, 0.64)),
    )
    return [
        (
            "main",
            union(
                capsule(u, v, (0.3, -0.82), (0.76, -0.66), 0.11),
                capsule(u, v, (0.76, -0.66), (0.86, -0.1), 0.11),
            ),
        ),
        ("main", ellipse(u, v, 0, -0.5, 0.52, 0.5)),
        ("second-", ellipse(u, v, 0, -0.58, 0.3, 0.36)),
        (
            "main",
            union(ellipse(u, v, -0.26, -0.92, 0.2, 0.1), ellipse(u, v, 0.26, -0.92, 0.2, 0.1)),
        ),
        ("main", ears),
        ("third-", inner),
        ("main", ellipse(u, v, 0, 0.32, 0.68, 0.48)),
        ("second-", ellipse(u, v, 0, 0.1, 0.36, 0.18)),
        ("ink-", _eyes(u, v, 0.32, 0.42, 0.1)),
        ("nose-", triangle(u, v, (-0.16, 0.28), (0.16, 0.28), (0, 0.06))),
    ]


def _car(u: Tensor, v: Tensor, other: bool) -> Layers:
    cabin = [
        ("second", both(box(u, v, -0.08, 0.28, 0.64, 0.5, 0.22), -(v + 0.2))),
        (
            "glass",
            union(box(u, v, -0.37, 0.3, 0.2, 0.2, 0.06), box(u, v, 0.2, 0.3, 0.2, 0.2, 0.06)),
        ),
    ]
    truck = [
        ("second", both(box(u, v, 0.2, 0.28, 0.44, 0.5, 0.16), -(v + 0.2))),
        ("glass", box(u, v, 0.3, 0.32, 0.22, 0.2, 0.06)),
        ("main", box(u, v, -0.66, 0.1, 0.34, 0.14, 0.04)),
    ]
    return [
        *(truck if other else cabin),
        ("main", box(u, v, 0, -0.2, 1.0, 0.34, 0.18)),
        ("lamp-", ellipse(u, v, 0.86, -0.1, 0.13, 0.13)),
        ("ink", union(circle(u, v, -0.54, -0.5, 0.3), circle(u, v, 0.54, -0.5, 0.3))),
        ("third-", union(circle(u, v, -0.54, -0.5, 0.18), circle(u, v, 0.54, -0.5, 0.18))),
    ]


def _house(u: Tensor, v: Tensor, other: bool) -> Layers:
    door = box(u, v, 0.0 if other else -0.36, -0.62, 0.18, 0.36)
    window = box(u, v, 0.46 if other else 0.36, -0.38, 0.15 if other else 0.18, 0.18)
    if other:
        window = union(window, box(u, v, -0.46, -0.38, 0.15, 0.18))
    return [
        ("third", box(u, v, 0.5, 0.56, 0.15, 0.34)),
        ("main", box(u, v, 0, -0.4, 0.74, 0.58)),
        ("second", triangle(u, v, (-1.0, 0.1), (1.0, 0.1), (0, 1.0))),
        ("third", door),
        ("lamp", window),
    ]


def _robot(u: Tensor, v: Tensor, other: bool) -> Layers:
    return [
        ("ink-", capsule(u, v, (0, 0.7), (0, 0.95), 0.06)),
        ("lamp", circle(u, v, 0, 0.98, 0.14)),
        ("third", union(box(u, v, -0.3, -0.84, 0.2, 0.16), box(u, v, 0.3, -0.84, 0.2, 0.16))),
        (
            "third",
            union(
                box(u, v, -0.78, -0.26, 0.16, 0.36, 0.1), box(u, v, 0.78, -0.26, 0.16, 0.36, 0.1)
            ),
        ),
        ("main", box(u, v, 0, -0.28, 0.58, 0.48, 0.08)),
        ("second", box(u, v, 0, 0.48, 0.62, 0.36, 0.1)),
        ("glass", union(circle(u, v, -0.26, 0.52, 0.16), circle(u, v, 0.26, 0.52, 0.16))),
    ]


def _fish(u: Tensor, v: Tensor, other: bool) -> Layers:
    if other:  # swimming up
        u, v = 0.94 * u + 0.34 * v, 0.94 * v - 0.34 * u
    return [
        ("second", triangle(u, v, (-0.38, 0), (-1.0, 0.56), (-1.0, -0.56))),
        ("third", triangle(u, v, (-0.35, 0.25), (0.45, 0.35), (-0.3, 0.9))),
        ("third", triangle(u, v, (-0.1, -0.3), (0.35, -0.35), (-0.15, -0.8))),
        ("main", ellipse(u, v, 0.16, 0, 0.8, 0.54)),
        ("white", circle(u, v, 0.54, 0.14, 0.18)),
        ("ink-", circle(u, v, 0.58, 0.14, 0.1)),
    ]


def _mushroom(u: Tensor, v: Tensor, other: bool) -> Layers:
    spots = (
        circle(u, v, -0.48, 0.24, 0.17),
        circle(u, v, 0.08, 0.52, 0.2),
        circle(u, v, 0.58, 0.16, 0.14),
    )
    return [
        ("second", both(box(u, v, 0, -0.5, 0.36, 0.5, 0.18), v - 0.1)),
        ("ink-", _eyes(u, v, 0.15, -0.5, 0.08)),
        ("third", both(ellipse(u, v, 0, -0.08, 0.62, 0.26), v - 0.1)),
        ("main", both(ellipse(u, v, 0, -0.1, 0.98, 1.05), -(v + 0.08))),
        ("spots-", union(*spots)),
    ]


KINDS: dict[str, Kind] = {
    "mug": Kind(("mug", "cup"), ("white", "blue", "brown"), _mug, (-0.18, 0.74), -0.12),
    "teddy": Kind(("teddy", "bear"), ("pink", "white", "purple"), _teddy, (0.0, 0.84), 0.0),
    "cat": Kind(("cat", "kitten"), ("orange", "cream", "pink"), _cat, (0.0, 0.72), -0.05),
    "car": Kind(("car", "automobile"), ("red", "white", "grey"), _car, (-0.08, 0.7), -0.2),
    "house": Kind(("house", "cottage"), ("yellow", "red", "brown"), _house, (0.0, 0.86), -0.36),
    "robot": Kind(("robot", "android"), ("blue", "grey", "orange"), _robot, (0.0, 0.76), -0.28),
    "fish": Kind(("fish",), ("green", "yellow", "orange"), _fish, (0.3, 0.46), 0.0),
    "mushroom": Kind(("mushroom",), ("red", "white", "cream"), _mushroom, (0.0, 0.86), 0.34),
}
CLASS_NAMES = tuple(KINDS)


def hat_layers(u: Tensor, v: Tensor, kind: Kind) -> Layers:
    """A pointed hat in the third colour, on top of the thing."""
    x, y = kind.hat
    return [("third", triangle(u, v, (x - 0.36, y), (x + 0.36, y), (x, y + 0.66)))]
