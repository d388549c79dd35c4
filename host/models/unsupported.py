"""What a user reads whose model cannot do what is asked of it: its name, why not, and what can.

Names are those of ComfyUI's model classes; a class that derives from one of them is told the same.
"""

from __future__ import annotations

from comfy.model_base import BaseModel

EDITS = "Edit Assumption, Erase Concepts, Debias"
"""The nodes of closed-form edits, as the interface calls them."""
CONCEPTS = "Train Concept, Apply Concepts"

JOINT = "its attention is over text and picture together"
_PICTURES = "it reads pictures and no prompt"
_FIXED = "its prompt is always the same one"
_FINDS = "it finds things in pictures and draws none"
_SOUND = "it makes sound and no pictures"
_UNKNOWN = "Perfusion does not know yet how it reads the text"
_OTHER_MAPS = "edits do not know the keys and values of its kind yet"
_NO_MAP = "it is not known to read encodings through linear maps of its own"

# Models that no prompt reaches, whatever their networks look like.
_UNPROMPTED: dict[str, str] = {
    "SVD_img2vid": _PICTURES,
    "Stable_Zero123": _PICTURES,
    "Hunyuan3Dv2": _PICTURES,
    "Hunyuan3Dv2_1": _PICTURES,
    "TripoSplat": _PICTURES,
    "RT_DETR_v4": _PICTURES,
    "DepthAnything3": _PICTURES,
    "Lotus": _FIXED,
    "SeedVR2": _FIXED,
    "SAM3": _FINDS,
}
_OF_SOUND = ("StableAudio1", "StableAudio3", "ACEStep", "ACEStep15")
_JOINT = (
    "AuraFlow",
    "Boogu",
    "CogVideoX",
    "ErnieImage",
    "Flux",
    "GenmoMochi",
    "HiDream",
    "HiDreamO1",
    "HunyuanImage21",
    "HunyuanVideo",
    "Ideogram4",
    "JoyImage",
    "Krea2",
    "Lens",
    "Lumina2",
    "MiniMaxH3",
    "Omnigen2",
    "PixelDiTT2I",
    "QwenImage",
    "SD3",
    "StableCascade_B",
    "StableCascade_C",
)
_WHY = _UNPROMPTED | dict.fromkeys(_OF_SOUND, _SOUND) | dict.fromkeys(_JOINT, JOINT)


class UnsupportedModelError(ValueError):
    """The model or text encoder is not one that can be edited."""


def describe_model(model: BaseModel) -> str:
    """How a model is called in messages: its class and, where it has another name, its kind."""
    name = type(model).__name__
    config = type(getattr(model, "model_config", None)).__name__
    return name if config in (name, "NoneType") else f"{name} (configuration {config})"


def unprompted(model: BaseModel) -> str | None:
    """Why no prompt reaches a model, None where one does."""
    return _of_class(model, _UNPROMPTED)


def foreign(model: BaseModel) -> str | None:
    """What another pack put in the place of a model's network, None for nothing."""
    network = getattr(model, "diffusion_model", None)
    if network is None or type(network).__module__.startswith("comfy."):
        return None
    return (
        f"its network is a {type(network).__name__}, which another pack put in the place of "
        "ComfyUI's own"
    )


def no_concepts(
    model: BaseModel, families: str, editable: bool, why: str | None = None
) -> UnsupportedModelError:
    """The error for a model to which no concept can be applied.

    Args:
        model: what was asked for.
        families: those that concepts work on, for people.
        editable: whether closed-form edits work on it.
        why: what is odd about it; its class tells where that is None.
    """
    reason = why or foreign(model) or _of_class(model, _WHY) or _UNKNOWN
    remedy = f"Closed-form edits do work on it: {EDITS}." if editable else "Load one of those."
    return UnsupportedModelError(
        f"{describe_model(model)} cannot take concepts: {reason}; supported are {families}. "
        f"{remedy}"
    )


def no_edits(model: BaseModel, works: str, conceptual: bool) -> UnsupportedModelError:
    """The error for a model that closed-form edits cannot act on.

    Args:
        model: what was asked for.
        works: what they act on, for people.
        conceptual: whether concepts work on it.
    """
    reason = unprompted(model) or foreign(model) or _NO_MAP
    if conceptual:
        reason = _OTHER_MAPS
    remedy = f" Concepts do work on it: {CONCEPTS}." if conceptual else ""
    return UnsupportedModelError(
        f"{describe_model(model)} cannot be edited in closed form: {reason}. What works: {works}."
        f"{remedy}"
    )


def _of_class(model: BaseModel, table: dict[str, str]) -> str | None:
    names = (kind.__name__ for kind in type(model).__mro__)
    return next((table[name] for name in names if name in table), None)
