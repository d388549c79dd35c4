"""The fixed palette of the small world: every rendering is made of these colours alone.

Colours of things come in pairs, light and shade; the first eight pairs have a name in captions, the
others have no word.
"""

import torch
from torch import Tensor

THING_COLORS: dict[str, tuple[str, str]] = {
    "red": ("e8383f", "a5202f"),
    "orange": ("fb7f1e", "c4511a"),
    "yellow": ("ffd93b", "e2a31f"),
    "green": ("3fae49", "237a3b"),
    "blue": ("3a74ea", "274da6"),
    "purple": ("8f4bd0", "623098"),
    "pink": ("ff90bb", "dc5f90"),
    "white": ("fbf8f0", "cdcfdd"),
    "brown": ("99603a", "6b3f28"),
    "teal": ("0f8f8c", "0b6468"),
    "navy": ("2b3a78", "1c2550"),
    "maroon": ("84203f", "58152c"),
    "lime": ("bfe83c", "8db820"),
    "grey": ("8d95a6", "646b7e"),
    "cream": ("efd6a4", "caa873"),
    "mint": ("9cf0ca", "60c49b"),
    "lavender": ("c9b8f7", "9985d1"),
    "cyan": ("5cd9f7", "2da5cd"),
    "charcoal": ("46424f", "2f2c38"),
}
"""Light and shade of each colour a thing can have."""
NAMED = 8
"""How many of them, from the first, captions have a word for."""

FIXED_COLORS: dict[str, str] = {
    "ink": "1d1828",
    "glass": "bfeaf7",
    "lamp": "ffe98a",
    "sky": "8fd2f8",
    "cloud": "eaf6fd",
    "sea": "2f8dd2",
    "foam": "d5f1fb",
    "sun": "fff07a",
    "sand": "f5dd9d",
    "sand_shade": "d9b872",
    "winter_sky": "a7bfe0",
    "snow": "f0f5fc",
    "snow_shade": "c3d3e8",
    "pine": "2c6a5c",
    "leaves": "2b5a38",
    "leaves_light": "3d7742",
    "grass": "6aa63f",
    "grass_shade": "47802f",
    "trunk": "5b3b24",
    "dusk": "ffb870",
    "dusk_light": "ffd9a0",
    "dune": "e8a055",
    "dune_far": "cf7d45",
    "dune_shade": "b9703a",
    "cactus": "3f8a4c",
    "city_sky": "c9d4ea",
    "tower": "7b86a0",
    "tower_dark": "5d6782",
    "window": "ffe28c",
    "shade_leaf": "8fae7c",
    "road": "555866",
    "road_shade": "3f414d",
    "night": "34377f",
    "nebula": "4d47a6",
    "star": "fffbe0",
    "planet": "d07fb4",
    "ring": "f2cf9a",
    "wall_rose": "f4d3d0",
    "floor_rose": "dcaeb0",
    "wall_sky": "d3e6f2",
    "floor_sky": "aac6da",
    "wall_leaf": "d9e8cb",
    "floor_leaf": "b3cc9f",
    "shade_rose": "c08a90",
    "shade_sky": "86a9c4",
    "paper": "f7f2e4",
    "pencil_1": "e6cfb4",
    "pencil_2": "bd9169",
    "pencil_3": "7a4f38",
}


def _rgb(code: str) -> tuple[float, ...]:
    return tuple(int(code[i : i + 2], 16) / 255 for i in (0, 2, 4))


_CODES = [code for pair in THING_COLORS.values() for code in pair] + list(FIXED_COLORS.values())
PALETTE: Tensor = torch.tensor([_rgb(code) for code in _CODES])
"""RGB in [0, 1], (colours, 3)."""
_FIRST_FIXED = 2 * len(THING_COLORS)
FIXED: dict[str, int] = {name: _FIRST_FIXED + i for i, name in enumerate(FIXED_COLORS)}
"""Index into the palette of every fixed colour; thing colour k is at 2 k, its shade at 2 k + 1."""


def _tones(dark: float, light: float) -> Tensor:
    """The pencil tone of each colour: by where its lightness, 0 to 1, lies beside two limits."""
    tones = torch.tensor([FIXED["pencil_2"], FIXED["pencil_1"], FIXED["paper"]])
    lightness = PALETTE @ torch.tensor([0.3, 0.59, 0.11])
    return tones[torch.bucketize(lightness, torch.tensor([dark, light]))]


PENCIL: Tensor = _tones(0.42, 0.68)
"""The pencil tone that stands for each colour of a thing in a sketch, (colours,)."""
PENCIL[FIXED["ink"]] = FIXED["pencil_3"]

WASH: Tensor = _tones(0.34, 0.62)
"""The pencil tone that stands for each colour of what is behind the things, (colours,)."""
