"""The personal things: fixed looks that no caption can name, for a concept to learn."""

from dataclasses import dataclass, fields

import torch

from .classes import CLASS_NAMES, KINDS
from .specs import ALL_COLORS, GRID, SCENES, STYLES, VARIANTS, Specs, sample_specs
from .sprites import PATTERNS

TRAINING_SCENES = ("plain", "city", "forest", "snow", "plain", "plain")
"""Where personal things are photographed; beach, desert and space stay unseen."""


@dataclass(frozen=True)
class Look:
    """One thing's fixed appearance."""

    kind: str
    color: str
    second: str
    third: str
    pattern: str = "plain"
    hat: bool = False


THINGS: dict[str, Look] = {
    "Pim the cat": Look("cat", "teal", "cream", "teal", pattern="halves"),
    "Olli the mug": Look("mug", "cream", "blue", "red", pattern="halves"),
    "Bo the teddy": Look("teddy", "brown", "mint", "yellow", hat=True),
    "Tak the robot": Look("robot", "mint", "purple", "orange", pattern="halves"),
    "Fy the mushroom": Look("mushroom", "lime", "blue", "yellow", pattern="halves"),
}
SUBJECTS: list[str] = list(THINGS)


def look_of(subject: str | Look) -> Look:
    """The look of a personal thing, or one that is none of them as it is."""
    return subject if isinstance(subject, Look) else THINGS[subject]


def superclass_of(subject: str | Look) -> str:
    """The word a stranger would use for a personal thing, such as "cat"."""
    return KINDS[look_of(subject).kind].words[0]


def put_thing(specs: Specs, subject: str | Look, place: int = 0) -> Specs:
    """Give the thing at ``place`` of every picture the look of ``subject``."""
    look = look_of(subject)
    values = {
        "kind": CLASS_NAMES.index(look.kind),
        "color": ALL_COLORS.index(look.color),
        "second": ALL_COLORS.index(look.second),
        "third": ALL_COLORS.index(look.third),
        "pattern": PATTERNS.index(look.pattern),
        "hat": int(look.hat),
    }
    out = {f.name: getattr(specs, f.name).clone() for f in fields(Specs)}
    for name, value in values.items():
        out[name][:, place] = value
    return Specs(**out)


def photo_specs(count: int, seed: int) -> Specs:
    """Single things of medium or large size, as one would photograph something to show it."""
    specs = sample_specs(count, seed, two_share=0.0, odd_share=1.0)
    specs.style[:] = STYLES.index("photo")
    g = torch.Generator().manual_seed(seed + 1)
    specs.size_class[:, 0] = torch.randint(1, 3, (count,), generator=g)
    specs.x[:, 0] = GRID * (2 * torch.randint(0, 2, (count,), generator=g) - 1)
    return specs


def personal_specs(subject: str | Look, count: int, seed: int) -> Specs:
    """``count`` photographs of a personal thing in ``TRAINING_SCENES``, each from another view."""
    specs = put_thing(photo_specs(count, seed), subject)
    first = torch.randint(VARIANTS, (1,), generator=torch.Generator().manual_seed(seed + 2))
    specs.variant = (first + 3 * torch.arange(count)) % VARIANTS  # all of them, left and right
    specs.scene = torch.tensor(
        [SCENES.index(TRAINING_SCENES[i % len(TRAINING_SCENES)]) for i in range(count)]
    )
    return specs
