"""Model families: which models can be edited, and where their text projections are.

Found by structure, never by a list of layer names: in ComfyUI's UNetModel every module called
`attn2` that owns `to_k` and `to_v` reads the text. Modules are judged by `in_features` and
`out_features` only, because quantised layers are not `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import BaseModel
from comfy.sd import CLIP

from .text_entries import entry_of
from .unsupported import UnsupportedModelError, describe_model, no_concepts, unprompted


@dataclass(frozen=True)
class OwnWords:
    """What to say to a family whose text encoder knows few words.

    Attributes:
        key: names the captions wherever statistics of them are kept.
        captions: count -> that many captions.
        most: captions beyond which nothing new is said.
        sentences: each with one ``{}``, for a phrase to stand in.
    """

    key: str
    captions: Callable[[int], list[str]]
    most: int
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A family of models that share text encoders and layer structure.

    Attributes:
        name: identifier stored in concept files.
        label: the name a person knows it by.
        encoders: text encoder name (as in ComfyUI's `clip_<name>`) to its embedding width.
        width: D, the width of the encodings the projections read.
        side: latent cells a side of the pictures it was trained on.
        words: for a family that does not know everyday language.
    """

    name: str
    label: str
    encoders: dict[str, int]
    width: int
    side: int
    words: OwnWords | None = None


FAMILIES: list[Family] = [
    Family("sd1", "Stable Diffusion 1.x", {"l": 768}, 768, side=64),
    Family("sd2", "Stable Diffusion 2.x", {"h": 1024}, 1024, side=96),
    Family("sdxl", "SDXL", {"l": 768, "g": 1280}, 2048, side=128),
    Family("sdxl_refiner", "SDXL refiner", {"g": 1280}, 1280, side=128),
]


def register_family(family: Family) -> None:
    """Add a row to the table, or replace the one of the same name."""
    FAMILIES[:] = [known for known in FAMILIES if known.name != family.name] + [family]


_CLIP_PREFIX = "clip_"


@dataclass(frozen=True)
class CrossAttention:
    """The two text projections of one cross-attention layer.

    Attributes:
        name: path of the attention module below `diffusion_model`.
        to_k, to_v: the projection modules (D -> `key_width`, D -> `value_width`).
    """

    name: str
    to_k: Any
    to_v: Any

    @property
    def input_width(self) -> int:
        """D, the width of the encodings."""
        return int(self.to_k.in_features)

    @property
    def key_width(self) -> int:
        """d of the key projection."""
        return int(self.to_k.out_features)

    @property
    def value_width(self) -> int:
        """d of the value projection."""
        return int(self.to_v.out_features)


def supported_list() -> str:
    """The supported families as one readable line."""
    return ", ".join(family.label for family in FAMILIES)


def family_named(name: str) -> Family | None:
    """The family with this identifier, None when there is none."""
    return next((family for family in FAMILIES if family.name == name), None)


def cross_attentions(model: BaseModel) -> tuple[CrossAttention, ...]:
    """Every cross-attention over the text in a ComfyUI BaseModel, in module order.

    Raises:
        UnsupportedModelError: for models other than ComfyUI's UNetModel (joint attention, video)
            and for a UNet without any such layer.
    """
    unet = getattr(model, "diffusion_model", None)
    # LTXV and others also have modules called attn2; their text goes through more layers first.
    if not isinstance(unet, UNetModel):
        raise _refused(model)
    found = []
    for name, module in unet.named_modules():
        if name.rsplit(".", 1)[-1] != "attn2" or ".time_stack." in name:
            continue
        to_k, to_v = getattr(module, "to_k", None), getattr(module, "to_v", None)
        if all(hasattr(linear, "in_features") for linear in (to_k, to_v)):
            found.append(CrossAttention(name, to_k, to_v))
    if not found:
        raise UnsupportedModelError(
            f"{describe_model(model)} has no cross-attention layer over the text (no module "
            f"`attn2` with `to_k` and `to_v`); supported are {supported_list()}."
        )
    return tuple(found)


def family_of(model: BaseModel) -> Family:
    """The family of a ComfyUI BaseModel, by its structure and the width of its text.

    Raises:
        UnsupportedModelError: when it is none of the table, naming the model and the table.
    """
    if (reason := unprompted(model)) is not None:
        raise _refused(model, reason)
    layers = cross_attentions(model)
    widths = {layer.input_width for layer in layers}
    # Video models read pictures, not text, through layers that look the same.
    temporal = model.model_config.unet_config.get("use_temporal_attention", False)
    matches = [] if temporal else [family for family in FAMILIES if widths == {family.width}]
    if not matches:
        kind = "video model" if temporal else "text width"
        found = "/".join(str(width) for width in sorted(widths))
        raise _refused(model, f"it is of an unknown family ({kind} {found})")
    return matches[0]


def _refused(model: BaseModel, why: str | None = None) -> UnsupportedModelError:
    return no_concepts(model, supported_list(), entry_of(model) is not None, why)


def encoder_models(clip: CLIP) -> dict[str, Any]:
    """The text encoders of a ComfyUI CLIP by name ("l", "g", "h"), as their SDClipModel."""
    return {
        name.removeprefix(_CLIP_PREFIX): module
        for name, module in clip.cond_stage_model.named_children()
        if name.startswith(_CLIP_PREFIX) and hasattr(module, "transformer")
    }


def embedding_width(encoder: Any) -> int:
    """Width of the token embeddings of one SDClipModel."""
    return int(encoder.transformer.get_input_embeddings().weight.shape[1])


def check_clip(clip: CLIP, family: Family) -> None:
    """Make sure a ComfyUI CLIP has the encoders of a family.

    Raises:
        UnsupportedModelError: naming what the family needs and what the CLIP has.
    """
    found = {name: embedding_width(encoder) for name, encoder in encoder_models(clip).items()}
    if found != family.encoders:
        raise UnsupportedModelError(
            f"the CLIP does not belong to {family.label}: expected the text encoders "
            f"{_widths(family.encoders)}, found {_widths(found)}. Connect the CLIP that was "
            "loaded together with the model."
        )


def family_of_clip(clip: CLIP) -> Family:
    """The family whose text encoders a ComfyUI CLIP has.

    Raises:
        UnsupportedModelError: when no family of the table has them.
    """
    found = {name: embedding_width(encoder) for name, encoder in encoder_models(clip).items()}
    for family in FAMILIES:
        if family.encoders == found:
            return family
    kind = type(clip.cond_stage_model).__name__
    raise UnsupportedModelError(
        f"the text encoder {kind} ({_widths(found)}) belongs to no supported family; "
        f"supported are {supported_list()}."
    )


def _widths(encoders: dict[str, int]) -> str:
    if not encoders:
        return "none"
    return ", ".join(f"clip_{name} ({width} wide)" for name, width in sorted(encoders.items()))
