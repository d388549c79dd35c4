"""What is in a picture: every attribute of the small world, drawn at random or fixed.

A ``Specs`` holds tensors whose first axis is the picture; attributes of things have a second axis
of two places. A picture shows one or two things; the second is ignored where ``two`` is false.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .classes import CLASS_NAMES, KINDS
from .palette import NAMED, THING_COLORS
from .sprites import HATS, PATTERNS

ALL_COLORS = tuple(THING_COLORS)
COLOR_NAMES = ALL_COLORS[:NAMED]
"""Colours that captions name; the others of ``ALL_COLORS`` have no word."""
UNNAMED_COLOR = NAMED
"""From this index on a colour has no word."""
SCENES = ("plain", "beach", "snow", "forest", "desert", "city", "space")
STYLES = ("photo", "sketch")
VARIANTS = 8
GRID = 8
"""Things stand on a grid of so many pixels: shapes are then always cut alike into latents."""
PAIR_SIZE = 0
_USUAL = torch.tensor(
    [[ALL_COLORS.index(c) for c in KINDS[name].usual_colors] for name in CLASS_NAMES]
)
"""Colours in roles main, second and third that things of each kind usually have, (kinds, 3)."""


@dataclass
class Specs:
    """Attributes of n pictures, all integers."""

    scene: Tensor  # n
    variant: Tensor  # n, which of the scene's views
    style: Tensor  # n
    two: Tensor  # n, bool
    first_is_left: Tensor  # n, bool, meaningful where two
    kind: Tensor  # n 2
    color: Tensor  # n 2, index into ALL_COLORS
    second: Tensor  # n 2, likewise
    third: Tensor  # n 2, likewise
    pattern: Tensor  # n 2
    hat: Tensor  # n 2, 0 or 1
    size_class: Tensor  # n 2, small, usual or big; PAIR_SIZE where there are two
    x: Tensor  # n 2, centre of the thing in pixels from the picture's middle
    near: Tensor  # n 2, 0 or 1: how far in front it stands

    def __len__(self) -> int:
        return len(self.scene)

    @property
    def flip(self) -> Tensor:
        """Which things look left, bool (n, 2): they face the middle; there, as the view does.

        Left to chance, the side of a tail is what a model decides last, and then it draws two.
        """
        return torch.where(self.x == 0, (self.variant % 2 == 0)[:, None], self.x > 0)

    def take(self, index: Tensor | slice) -> "Specs":
        """The pictures at ``index``."""
        return Specs(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


LOOK = ("kind", "color", "second", "third", "pattern", "hat")
"""What makes a thing this very thing."""


def _beside(color: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """Second and third colours that a thing of that kind and main colour usually has."""
    usual = _USUAL[kind]
    second, third = (torch.where(c == color, usual[..., 0], c) for c in usual.unbind(-1)[1:])
    return second, third


def ordinary(specs: Specs) -> Tensor:
    """Whether words can tell all of a thing's look, bool (n, 2): what they leave out is usual."""
    second, third = _beside(specs.color, specs.kind)
    usual = (specs.second == second) & (specs.third == third) & (specs.hat == 0)
    return usual & (specs.color < UNNAMED_COLOR) & (specs.pattern != PATTERNS.index("halves"))


def sample_specs(n: int, seed: int, two_share: float = 0.2, odd_share: float = 0.0) -> Specs:
    """n random pictures of the world the base model learns.

    Words can tell the looks of things (``ordinary``) but for ``odd_share`` of them, whose looks are
    drawn from all there are. Of the ordinary ones 40 % have their kind's usual main colour, which
    gives the model an assumption it can be asked about: mugs are white, mushrooms red.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g)

    def below(top: int, *shape: int) -> Tensor:
        return torch.randint(top, shape, generator=g)

    def choose(weights: list[float], *shape: int) -> Tensor:
        total = int(torch.tensor(shape).prod())
        return torch.multinomial(torch.tensor(weights), total, True, generator=g).view(*shape)

    def another(than: Tensor) -> Tensor:
        """A colour unlike the given one."""
        return (than + 1 + below(len(ALL_COLORS) - 1, n, 2)) % len(ALL_COLORS)

    two = uniform(n) < two_share
    kind = below(len(CLASS_NAMES), n, 2)
    weights = [1.0] * NAMED + [0.5] * (len(ALL_COLORS) - NAMED)
    odd = uniform(n, 2) < odd_share
    color = choose(weights, n, 2)
    color = torch.where(odd, color, color % NAMED)
    color = torch.where(~odd & (uniform(n, 2) < 0.4), _USUAL[kind][..., 0], color)
    second, third = _beside(color, kind)
    odd_pattern, plain_pattern = choose([0.45, 0.25, 0.3], n, 2), choose([0.72, 0.28], n, 2)
    size_class = choose([0.2, 0.5, 0.3], n, 2)
    first_is_left = uniform(n) < 0.5
    sign = torch.where(first_is_left, -1, 1)
    x_one = torch.where(uniform(n, 2) < 0.5, -GRID, GRID)  # never half-way: things face the middle
    return Specs(
        scene=choose([1.6, 1, 1, 1, 1, 1, 1], n),
        variant=below(VARIANTS, n),
        style=choose([0.75, 0.25], n),
        two=two,
        first_is_left=first_is_left,
        kind=kind,
        color=color,
        second=torch.where(odd, another(color), second),
        third=torch.where(odd, another(color), third),
        pattern=torch.where(odd, odd_pattern, plain_pattern),
        hat=(odd & (uniform(n, 2) < 0.25)).long() * (HATS - 1),
        size_class=torch.where(two[:, None], PAIR_SIZE, size_class),
        x=torch.where(two[:, None], torch.stack([16 * sign, -16 * sign], 1), x_one),
        near=below(2, n, 2) * two[:, None],
    )
