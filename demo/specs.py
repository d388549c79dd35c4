"""What is in a picture: every attribute of the small world, drawn at random or fixed.

A ``Specs`` holds tensors whose first axis is the picture; attributes of things have a second axis
of two places. A picture shows one or two things; the second is ignored where ``two`` is false.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .classes import CLASS_NAMES, KINDS

# name: hue centre, hue spread, saturation range, value range
COLORS = {
    "red": (0.0, 0.018, (0.8, 1.0), (0.75, 0.95)),
    "orange": (0.08, 0.014, (0.85, 1.0), (0.92, 1.0)),
    "yellow": (0.15, 0.014, (0.75, 1.0), (0.92, 1.0)),
    "green": (0.34, 0.04, (0.6, 1.0), (0.45, 0.8)),
    "blue": (0.61, 0.025, (0.7, 1.0), (0.65, 0.95)),
    "purple": (0.76, 0.02, (0.55, 0.9), (0.5, 0.8)),
    "pink": (0.92, 0.02, (0.35, 0.55), (0.95, 1.0)),
    "white": (0.1, 0.5, (0.0, 0.05), (0.93, 1.0)),
}
COLOR_NAMES = tuple(COLORS)
UNNAMED_COLOR = len(COLOR_NAMES)
"""Index of "any hue": a colour that captions never name."""

PATTERNS = ("plain", "striped", "spotted", "halves", "rings")
"""The last two have no word in any caption."""
EMBLEMS = ("none", "star", "heart", "disc")
"""Without a word, like faces and horns."""
SCENES = ("plain", "beach", "snow", "forest", "desert", "city", "space")
STYLES = ("photo", "sketch")
_SIDE = torch.tensor([0.46, 0.6, 0.74])
_USUAL = torch.tensor([COLOR_NAMES.index(KINDS[name].usual_color) for name in CLASS_NAMES])


@dataclass
class Specs:
    """Attributes of n pictures: colours as RGB in [0, 1], places and sizes in half-sides."""

    scene: Tensor  # n
    scene_parameters: Tensor  # n 10, in [0, 1)
    style: Tensor  # n
    two: Tensor  # n, bool
    first_is_left: Tensor  # n, bool, meaningful where two
    kind: Tensor  # n 2
    color: Tensor  # n 2, index into COLOR_NAMES or UNNAMED_COLOR
    main: Tensor  # n 2 3
    second: Tensor  # n 2 3
    third: Tensor  # n 2 3, colour of marks
    pattern: Tensor  # n 2
    pattern_parameters: Tensor  # n 2 3: phase, frequency, direction
    face: Tensor  # n 2, bool
    horn: Tensor  # n 2, bool
    emblem: Tensor  # n 2
    size_class: Tensor  # n 2
    size: Tensor  # n 2
    x: Tensor  # n 2
    height: Tensor  # n 2, in [0, 1): where between horizon and lower edge
    tilt: Tensor  # n 2
    flip: Tensor  # n 2, +1 or -1

    def __len__(self) -> int:
        return len(self.scene)

    def take(self, index: Tensor | slice) -> "Specs":
        """The pictures at ``index``."""
        return Specs(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Colours (..., 3) from hue, saturation and value in [0, 1]."""
    sixth = (hue % 1.0) * 6

    def channel(n: int) -> Tensor:
        k = (n + sixth) % 6
        return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], -1)


def sample_colors(index: Tensor, generator: torch.Generator) -> Tensor:
    """RGB (n, 3) for colour indices (n,); ``UNNAMED_COLOR`` draws any lively hue."""
    rows = [*COLORS.values(), (0.5, 0.5, (0.4, 1.0), (0.45, 1.0))]
    table = torch.tensor([[h, spread, *s, *v] for h, spread, s, v in rows])[index]
    r = torch.rand(len(index), 3, generator=generator)
    hue = table[:, 0] + table[:, 1] * (2 * r[:, 0] - 1)
    saturation = table[:, 2] + (table[:, 3] - table[:, 2]) * r[:, 1]
    value = table[:, 4] + (table[:, 5] - table[:, 4]) * r[:, 2]
    return hsv_to_rgb(hue, saturation, value)


def sample_specs(n: int, seed: int, two_share: float = 0.2) -> Specs:
    """n random pictures of the world the base model learns.

    A thing whose colour is drawn as usual for its kind (45 % of them) gives the model an assumption
    it can be asked about: most mugs are white, most mushrooms red.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g)

    def choose(weights: list[float], *shape: int) -> Tensor:
        total = int(torch.tensor(shape).prod())
        return torch.multinomial(torch.tensor(weights), total, True, generator=g).view(*shape)

    def colors(unnamed_weight: float) -> Tensor:
        return choose([1.0] * len(COLOR_NAMES) + [unnamed_weight], n, 2)

    def rgb(index: Tensor) -> Tensor:
        return sample_colors(index.reshape(-1), g).view(n, 2, 3)

    two = uniform(n) < two_share
    kind = torch.randint(len(CLASS_NAMES), (n, 2), generator=g)
    color = torch.where(uniform(n, 2) < 0.45, _USUAL[kind], colors(2.5))
    size_class = choose([0.22, 0.5, 0.28], n, 2)
    size = _SIDE[size_class] * (0.93 + 0.14 * uniform(n, 2))
    size = torch.where(two[:, None], size.clamp(0.44, 0.5), size)
    first_is_left = uniform(n) < 0.5
    aside = 0.48 + 0.06 * uniform(n, 2)
    sign = torch.where(first_is_left, -1.0, 1.0)
    x_two = torch.stack([sign * aside[:, 0], -sign * aside[:, 1]], 1)
    x_one = (2 * uniform(n, 2) - 1) * (0.9 - size).clamp(0.02, 0.45)
    return Specs(
        scene=choose([1.6, 1, 1, 1, 1, 1, 1], n),
        scene_parameters=uniform(n, 10),
        style=choose([0.82, 0.18], n),
        two=two,
        first_is_left=first_is_left,
        kind=kind,
        color=color,
        main=rgb(color),
        second=rgb(colors(6.0)),
        third=rgb(colors(6.0)),
        pattern=choose([0.46, 0.14, 0.13, 0.14, 0.13], n, 2),
        pattern_parameters=uniform(n, 2, 3),
        face=uniform(n, 2) < 0.22,
        horn=uniform(n, 2) < 0.2,
        emblem=choose([0.66, 0.12, 0.11, 0.11], n, 2),
        size_class=size_class,
        size=size,
        x=torch.where(two[:, None], x_two, x_one),
        height=uniform(n, 2),
        tilt=(2 * uniform(n, 2) - 1) * 0.14,
        flip=torch.where(uniform(n, 2) < 0.5, -1.0, 1.0),
    )
