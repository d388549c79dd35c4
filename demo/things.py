"""The personal things: fixed looks that no caption can name, for a concept to learn."""

from dataclasses import dataclass, fields

import torch

from .classes import CLASS_NAMES, KINDS
from .specs import EMBLEMS, PATTERNS, SCENES, STYLES, UNNAMED_COLOR, Specs, sample_specs

Color = tuple[float, float, float]
TRAINING_SCENES = ("plain", "city", "plain", "snow", "plain", "forest")
"""Where personal things are photographed; beach, desert and space stay unseen."""


@dataclass(frozen=True)
class Look:
    """One thing's fixed appearance."""

    kind: str
    main: Color
    second: Color
    third: Color
    pattern: str = "plain"
    pattern_parameters: tuple[float, float, float] = (0.4, 0.4, 0.2)
    face: bool = False
    horn: bool = False
    emblem: str = "none"


THINGS: dict[str, Look] = {
    "Pim the cat": Look(
        "cat",
        (0.05, 0.55, 0.55),
        (0.98, 0.6, 0.45),
        (0.98, 0.9, 0.3),
        pattern="halves",
        pattern_parameters=(0.5, 0.4, 0.9),
        horn=True,
    ),
    "Olli the mug": Look(
        "mug",
        (0.72, 0.64, 0.94),
        (0.13, 0.15, 0.42),
        (0.98, 0.4, 0.35),
        pattern="rings",
        pattern_parameters=(0.2, 0.3, 0.2),
        face=True,
    ),
    "Bo the teddy": Look(
        "teddy", (0.52, 0.4, 0.2), (0.62, 0.95, 0.8), (1.0, 0.82, 0.2), face=True, horn=True
    ),
    "Tak the robot": Look(
        "robot",
        (0.98, 0.52, 0.42),
        (0.1, 0.16, 0.42),
        (0.98, 0.94, 0.8),
        pattern="halves",
        pattern_parameters=(0.5, 0.4, 0.2),
        emblem="heart",
    ),
    "Fy the mushroom": Look(
        "mushroom",
        (0.1, 0.2, 0.45),
        (0.75, 0.95, 0.25),
        (0.98, 0.35, 0.6),
        pattern="rings",
        pattern_parameters=(0.6, 0.2, 0.2),
        face=True,
    ),
}
SUBJECTS: list[str] = list(THINGS)


def superclass_of(subject: str) -> str:
    """The word a stranger would use for a personal thing, such as "cat"."""
    return KINDS[THINGS[subject].kind].words[0]


def put_thing(specs: Specs, subject: str, place: int = 0) -> Specs:
    """Give the thing at ``place`` of every picture the look of ``subject``."""
    look = THINGS[subject]
    values = {
        "kind": CLASS_NAMES.index(look.kind),
        "color": UNNAMED_COLOR,
        "main": torch.tensor(look.main),
        "second": torch.tensor(look.second),
        "third": torch.tensor(look.third),
        "pattern": PATTERNS.index(look.pattern),
        "pattern_parameters": torch.tensor(look.pattern_parameters),
        "face": look.face,
        "horn": look.horn,
        "emblem": EMBLEMS.index(look.emblem),
    }
    out = {f.name: getattr(specs, f.name).clone() for f in fields(Specs)}
    for name, value in values.items():
        out[name][:, place] = value
    return Specs(**out)


def photo_specs(count: int, seed: int) -> Specs:
    """Single things of medium or large size, as one would photograph something to show it."""
    specs = sample_specs(count, seed, two_share=0.0)
    specs.style[:] = STYLES.index("photo")
    g = torch.Generator().manual_seed(seed + 1)
    specs.size_class[:, 0] = torch.randint(1, 3, (count,), generator=g)
    specs.size[:, 0] = 0.58 + 0.16 * torch.rand(count, generator=g)
    specs.x[:, 0] = (2 * torch.rand(count, generator=g) - 1) * 0.18
    return specs


def personal_specs(subject: str, count: int, seed: int) -> Specs:
    """``count`` photographs of a personal thing in ``TRAINING_SCENES``."""
    specs = put_thing(photo_specs(count, seed), subject)
    specs.scene = torch.tensor(
        [SCENES.index(TRAINING_SCENES[i % len(TRAINING_SCENES)]) for i in range(count)]
    )
    return specs
