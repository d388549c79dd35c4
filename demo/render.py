"""The renderer: pictures and masks from ``Specs``. Batched, deterministic, on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .classes import CLASS_NAMES, KINDS, ROLE_COLORS, Anchors
from .scenery import over, paint_scenes
from .shapes import both, circle, coverage, ellipse, heart, star, triangle, union
from .specs import SCENES, STYLES, Specs

RESOLUTION = 48
_OUTLINE = 0.5


def pattern_colors(u: Tensor, v: Tensor, specs: dict[str, Tensor]) -> Tensor:
    """Main and second colour mixed by each thing's pattern: (n, 3, H, W)."""
    phase = specs["pattern_parameters"][:, 0, None, None] * 6.28
    frequency = 4.6 + 1.6 * specs["pattern_parameters"][:, 1, None, None]
    upright = specs["pattern_parameters"][:, 2, None, None] > 0.5
    along = torch.where(upright, u, v)
    share = torch.stack(
        [
            torch.zeros_like(u),
            torch.sigmoid(10 * torch.sin(along * frequency * 1.7 + phase)),
            torch.sigmoid(
                14
                * (
                    torch.sin(u * frequency * 1.5 + phase)
                    * torch.sin(v * frequency * 1.5 + phase * 0.7)
                    - 0.3
                )
            ),
            torch.sigmoid(25 * along),
            torch.sigmoid(
                10 * torch.sin(torch.sqrt(u * u + v * v + 1e-6) * frequency * 1.7 + phase)
            ),
        ],
        1,
    )[torch.arange(len(u)), specs["pattern"]][:, None]
    return specs["main"][:, :, None, None] * (1 - share) + specs["second"][:, :, None, None] * share


def _marks(
    u: Tensor, v: Tensor, anchors: Anchors, specs: dict[str, Tensor]
) -> list[tuple[Tensor, Tensor, bool]]:
    """Emblem, face and horn as (distance, colour (n, 3), sticks out of the body)."""
    n = len(u)
    white, black = torch.full((n, 3), 0.98), torch.full((n, 3), 0.08)
    far = torch.full_like(u, 9.0)

    def where(flag: Tensor, distance: Tensor) -> Tensor:
        return torch.where(flag[:, None, None], distance, far)

    x, y, r = anchors.emblem
    emblem = torch.stack(
        [far, star(u, v, x, y, r * 1.3), heart(u, v, x, y, r * 1.1), circle(u, v, x, y, r)], 1
    )
    fx, fy, s = anchors.face
    eyes = union(
        circle(u, v, fx - 0.34 * s, fy + 0.1, 0.3 * s),
        circle(u, v, fx + 0.34 * s, fy + 0.1, 0.3 * s),
    )
    pupils = union(
        circle(u, v, fx - 0.28 * s, fy + 0.08, 0.14 * s),
        circle(u, v, fx + 0.4 * s, fy + 0.08, 0.14 * s),
    )
    mouth = both(circle(u, v, fx, fy - 0.1 * s, 0.46 * s).abs() - 0.09 * s, v - (fy - 0.32 * s))
    hx, hy, hs = anchors.horn
    w = 0.34 * hs
    horn = triangle(
        u, v, (hx - 0.5 * w, hy - 0.12), (hx + 0.5 * w, hy - 0.12), (hx + 0.3 * w, hy + 1.4 * w)
    )
    return [
        (emblem[torch.arange(n), specs["emblem"]], specs["third"], False),
        (where(specs["face"], eyes), white, False),
        (where(specs["face"], pupils), black, False),
        (where(specs["face"], mouth), black, False),
        (where(specs["horn"], horn), specs["third"], True),
    ]


def _draw_things(
    picture: Tensor, name: str, u: Tensor, v: Tensor, pixel: Tensor, specs: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Draw one thing of kind ``name`` into each picture; returns pictures and masks (n, H, W)."""
    kind = KINDS[name]
    shade = (1.03 + 0.17 * v - 0.1 * u).clamp(0.7, 1.2)[:, None]
    patterned = (specs["pattern"] > 0)[:, None]
    second = torch.where(patterned, specs["second"] * 0.6 + specs["main"] * 0.4, specs["second"])
    colors = {"main": pattern_colors(u, v, specs), "second": second[:, :, None, None]}
    mask = torch.zeros_like(u)
    layers = [
        (distance, colors.get(role), ROLE_COLORS.get(role), True)
        for role, distance in kind.draw(u, v)
    ]
    layers += [
        (distance, color[:, :, None, None], None, grows)
        for distance, color, grows in _marks(u, v, kind.anchors, specs)
    ]
    for distance, color, fixed, grows in layers:
        cover = coverage(distance, pixel)
        if color is None:
            color = torch.tensor(fixed).view(1, 3, 1, 1)
        outline = (
            1 - _OUTLINE * (1 + distance / (1.5 * pixel)).clamp(0, 1)
            if grows
            else torch.ones_like(distance)
        )
        picture = over(picture, cover, color * shade * outline[:, None])
        if grows:
            mask = torch.maximum(mask, cover)
    return picture, mask


def _sketch(picture: Tensor) -> Tensor:
    """Pencil on paper: edges and a faint wash of the colours."""
    grey = picture.mean(1, keepdim=True)
    padded = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    edge = torch.sqrt(dx**2 + dy**2).amax(1, keepdim=True)
    paper = torch.tensor([0.98, 0.96, 0.9]).view(1, 3, 1, 1)
    wash = 0.78 + 0.22 * (picture * 0.75 + grey * 0.25)
    return (paper * wash - 1.0 * (edge - 0.12).clamp(0, 0.7)).clamp(0, 1)


@torch.no_grad()
def render(
    specs: Specs, resolution: int = RESOLUTION, supersampling: int = 2
) -> tuple[Tensor, Tensor]:
    """Pictures uint8 (n, 3, R, R) and masks of both things, float (n, 2, R, R) in [0, 1]."""
    side, n = resolution * supersampling, len(specs)
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    x, y, pixel = x[None], y[None], 2 / side
    horizon = 0.05 + 0.2 * specs.scene_parameters[:, 0]
    picture = paint_scenes(specs.scene, specs.scene_parameters, horizon, x, y)
    floating = specs.scene == SCENES.index("space")
    masks = torch.zeros(n, 2, side, side)
    for place in (1, 0):  # the first thing is in front
        size = specs.size[:, place]
        ground = (horizon + 0.36 + 0.3 * specs.height[:, place]).clamp(max=0.95)
        standing = torch.maximum(ground - size * 0.95, -0.92 + size * 1.1)
        center = torch.where(floating, (specs.height[:, place] - 0.4) * 0.5, standing)
        present = torch.ones(n, dtype=torch.bool) if place == 0 else specs.two
        for index, name in enumerate(CLASS_NAMES):
            rows = (present & (specs.kind[:, place] == index)).nonzero()[:, 0]
            if not len(rows):
                continue
            at = {
                f: getattr(specs, f)[rows, place]
                for f in (
                    "main",
                    "second",
                    "third",
                    "pattern",
                    "pattern_parameters",
                    "face",
                    "horn",
                    "emblem",
                    "x",
                    "tilt",
                    "flip",
                )
            }
            half, mid = size[rows, None, None], center[rows, None, None]
            dx, dy = x - at["x"][:, None, None], mid - y
            shadow = ellipse(dx, -dy, 0, half * 0.93, half * 0.85, half * 0.16)
            dark = 0.34 * torch.sigmoid(-shadow * 40) * (~floating[rows])[:, None, None]
            cos, sin = torch.cos(at["tilt"])[:, None, None], torch.sin(at["tilt"])[:, None, None]
            u = (cos * dx + sin * dy) / half * at["flip"][:, None, None]
            v = (-sin * dx + cos * dy) / half
            picture[rows], masks[rows, place] = _draw_things(
                picture[rows] * (1 - dark)[:, None], name, u, v, pixel / half, at
            )
    masks[:, 1] = masks[:, 1] * (1 - masks[:, 0])
    picture, masks = (
        F.avg_pool2d(picture.clamp(0, 1), supersampling),
        F.avg_pool2d(masks, supersampling),
    )
    rows = (specs.style == STYLES.index("sketch")).nonzero()[:, 0]
    if len(rows):
        picture[rows] = _sketch(picture[rows])
    return (picture * 255).round().to(torch.uint8), masks
