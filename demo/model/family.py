"""The small world as a row of the families' table."""

from ...host.models.families import Family, OwnWords
from ..captions import SCENE_WORDS, STYLE_WORDS, sample_captions
from .small_model import TEXT_CONFIG, UNET_CONFIG

_SCENES = ("", *(f" {places[0]}" for places in SCENE_WORDS.values()))
_STARTS = ("", *(f"{start} " for words in STYLE_WORDS.values() for start in words[:2]))

SMALL_WORLD = Family(
    "small_world",
    "the pack's small world",
    {"l": TEXT_CONFIG["hidden_size"]},
    UNET_CONFIG["context_dim"],
    side=8,
    words=OwnWords(
        key="small world 1",
        captions=sample_captions,
        most=600,
        sentences=tuple(f"{start}a {{}}{scene}" for start in _STARTS for scene in _SCENES),
    ),
)
