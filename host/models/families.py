"""Model families: which models can carry concepts, and which text encoders belong to them.

A family is one row of the table: a class of networks (`networks`), the width of the encodings
that it is called with, and the text encoders that make them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from comfy.model_base import BaseModel
from comfy.sd import CLIP
from comfy.text_encoders.anima import AnimaTEModel
from comfy.text_encoders.cosmos import CosmosT5XXL
from comfy.text_encoders.genmo import MochiT5XXL
from comfy.text_encoders.hydit import HyditModel
from comfy.text_encoders.pixart_t5 import PixArtT5XXL
from comfy.text_encoders.wan import WanT5Model
from torch import nn

from .networks import (
    ANIMA,
    COSMOS_PREDICT2,
    HUNYUAN_DIT,
    LTXV,
    PIXART,
    UNET,
    WAN,
    CrossAttention,
    Network,
    why_not,
)
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
        encoders: text encoder name (as in ComfyUI's `clip_<name>`, or alone where there is no
            such prefix) to its embedding width.
        width: D, the width of the encodings that the network is called with. Similarities and
            gates live in their space, whatever the network does to them before its projections
            read them: they are known before the first layer and depend on no layer and no step.
        side: latent cells a side of the pictures it was trained on.
        words: for a family that does not know everyday language.
        network: the networks it is of.
        clips: classes of a CLIP's text model, where widths alone do not tell; empty for any.
        tells: what else a model of it has, where the network is another family's, too.
        queries: tokens whose vectors are in a table of the model's, by the name of their
            tokenizer, to that table's width (`query_adapter`). What is read has their positions.
    """

    name: str
    label: str
    encoders: dict[str, int]
    width: int
    side: int
    words: OwnWords | None = None
    network: Network = UNET
    clips: tuple[type[nn.Module], ...] = ()
    tells: Callable[[BaseModel], bool] = lambda model: True
    queries: dict[str, int] = field(default_factory=dict)

    @property
    def positions(self) -> tuple[str, ...]:
        """Whose tokens the encodings belong to, one for one, those of one after the other's."""
        names = tuple(self.queries or self.encoders)
        return names[:1] if self.network.second is None else names

    @property
    def parts(self) -> tuple[int, ...]:
        """Columns of each text encoder, where tokens of one fill none of another's; or none."""
        return () if self.network.second is None else tuple(self.encoders.values())

    @property
    def vectors(self) -> dict[str, int]:
        """What a concept has a vector for, to its width."""
        return {**self.encoders, **self.queries}

    def owns(self, clip: CLIP) -> bool:
        """Whether a ComfyUI CLIP has this family's text encoders."""
        if encoder_widths(clip) != self.encoders:
            return False
        return not self.clips or isinstance(clip.cond_stage_model, self.clips)


FAMILIES: list[Family] = [
    Family("sd1", "Stable Diffusion 1.x", {"l": 768}, 768, side=64),
    Family("sd2", "Stable Diffusion 2.x", {"h": 1024}, 1024, side=96),
    Family("sdxl", "SDXL", {"l": 768, "g": 1280}, 2048, side=128),
    Family("sdxl_refiner", "SDXL refiner", {"g": 1280}, 1280, side=128),
    Family(
        *("cosmos_predict2", "Cosmos-Predict2", {"t5xxl": 1024}, 1024),
        side=128,
        network=COSMOS_PREDICT2,
        clips=(CosmosT5XXL,),
    ),
    Family(
        *("anima", "Anima", {"qwen3_06b": 1024}, 1024),
        side=128,
        network=ANIMA,
        clips=(AnimaTEModel,),
        queries={"t5xxl": 1024},
    ),
    Family(
        *("wan", "Wan 2.1/2.2", {"umt5xxl": 4096}, 4096),
        side=80,
        network=WAN,
        clips=(WanT5Model,),
    ),
    Family(
        *("pixart_alpha", "PixArt-Alpha", {"t5xxl": 4096}, 4096),
        side=128,
        network=PIXART,
        clips=(PixArtT5XXL,),
        tells=lambda model: bool(model.diffusion_model.micro_conditioning),
    ),
    Family(
        *("pixart_sigma", "PixArt-Sigma", {"t5xxl": 4096}, 4096),
        side=128,
        network=PIXART,
        clips=(PixArtT5XXL,),
        tells=lambda model: not model.diffusion_model.micro_conditioning,
    ),
    Family(
        *("hunyuan_dit", "HunyuanDiT", {"hydit_clip": 1024, "mt5xl": 2048}, 1024 + 2048),
        side=128,
        network=HUNYUAN_DIT,
        clips=(HyditModel,),
    ),
    Family(
        *("ltxv", "LTX-Video", {"t5xxl": 4096}, 4096),
        side=20,
        network=LTXV,
        clips=(MochiT5XXL,),
    ),
]


def register_family(family: Family) -> None:
    """Add a row to the table, or replace the one of the same name."""
    FAMILIES[:] = [known for known in FAMILIES if known.name != family.name] + [family]


_CLIP_PREFIX = "clip_"


def supported_list() -> str:
    """The supported families as one readable line."""
    return ", ".join(family.label for family in FAMILIES)


def family_named(name: str) -> Family | None:
    """The family with this identifier, None when there is none."""
    return next((family for family in FAMILIES if family.name == name), None)


def cross_attentions(model: BaseModel) -> tuple[CrossAttention, ...]:
    """Every cross-attention over the text in a ComfyUI BaseModel, in module order.

    Raises:
        UnsupportedModelError: for networks that are no family's, and for one without any such
            layer.
    """
    network = network_of(model)
    found = tuple(network.cross_attentions(model.diffusion_model))
    kind = " and ".join(f"`{name}`" for name in network.projections)
    for path, name in network.unreachable(model.diffusion_model):
        raise UnsupportedModelError(
            f"{describe_model(model)} has a {name} in the place of its cross-attention {path!r}, "
            f"which another pack put there and whose projections ({kind}) cannot be reached; load "
            "the model with one of ComfyUI's own loaders"
        )
    if not found:
        raise UnsupportedModelError(
            f"{describe_model(model)} has no cross-attention layer over the text (no module "
            f"that matches {network.attention} with {kind}); supported are {supported_list()}."
        )
    return found


def network_of(model: BaseModel) -> Network:
    """The row of the network that a ComfyUI BaseModel has.

    Raises:
        UnsupportedModelError: when no family has such a network (joint attention and others).
    """
    network = getattr(model, "diffusion_model", None)
    rows = (family.network for family in FAMILIES)
    found = next((row for row in rows if row.fits(network)), None)
    if found is None:
        raise _refused(model, why_not(network) or None)
    return found


def family_of(model: BaseModel) -> Family:
    """The family of a ComfyUI BaseModel, by its structure and the width of its text.

    Raises:
        UnsupportedModelError: when it is none of the table, naming the model and the table.
    """
    if (reason := unprompted(model)) is not None:
        raise _refused(model, reason)
    cross_attentions(model)
    network = network_of(model)
    widths = network.text_widths(model.diffusion_model)
    # Video models read pictures, not text, through layers that look the same.
    temporal = model.model_config.unet_config.get("use_temporal_attention", False)
    matches = [
        family
        for family in FAMILIES
        if family.network is network and widths == {family.width} and family.tells(model)
    ]
    matches = [] if temporal else matches
    if not matches:
        kind = "video model" if temporal else "text width"
        found = "/".join(str(width) for width in sorted(widths))
        raise _refused(model, f"it is of an unknown family ({kind} {found})")
    return matches[0]


def _refused(model: BaseModel, why: str | None = None) -> UnsupportedModelError:
    return no_concepts(model, supported_list(), entry_of(model) is not None, why)


def encoder_models(clip: CLIP) -> dict[str, Any]:
    """The text encoders of a ComfyUI CLIP by name ("l", "g", "t5xxl"), as their SDClipModel."""
    return {
        name.removeprefix(_CLIP_PREFIX): module
        for name, module in clip.cond_stage_model.named_children()
        if hasattr(module, "transformer")
    }


def encoder_of(text_model: Any, name: str) -> Any:
    """One text encoder of ComfyUI's text model, by the name `encoder_models` gives it."""
    return getattr(text_model, attribute_of(text_model, name))


def attribute_of(owner: Any, name: str) -> str:
    """Under which attribute ComfyUI keeps the encoder, or the tokenizer, of this name."""
    return f"{_CLIP_PREFIX}{name}" if hasattr(owner, f"{_CLIP_PREFIX}{name}") else name


def tokenizer_of(clip: CLIP, name: str) -> Any:
    """ComfyUI's SDTokenizer of one text encoder of a CLIP."""
    return getattr(clip.tokenizer, attribute_of(clip.tokenizer, name))


def embedding_width(encoder: Any) -> int:
    """Width of the token embeddings of one SDClipModel."""
    return int(encoder.transformer.get_input_embeddings().weight.shape[1])


def encoder_widths(clip: CLIP) -> dict[str, int]:
    """The text encoders of a ComfyUI CLIP by name, with their embeddings' widths."""
    return {name: embedding_width(encoder) for name, encoder in encoder_models(clip).items()}


def query_widths(clip: CLIP) -> dict[str, int]:
    """`Family.queries` of the family whose text encoders a CLIP has; none for an unknown one."""
    return next((family.queries for family in FAMILIES if family.owns(clip)), {})


def check_clip(clip: CLIP, family: Family) -> None:
    """Make sure a ComfyUI CLIP has the encoders of a family.

    Raises:
        UnsupportedModelError: naming what the family needs and what the CLIP has.
    """
    if family.owns(clip):
        return
    found = encoder_widths(clip)
    kind = "" if found != family.encoders else f" of {type(clip.cond_stage_model).__name__}"
    raise UnsupportedModelError(
        f"the CLIP does not belong to {family.label}: expected the text encoders "
        f"{_widths(family.encoders)}, found {_widths(found)}{kind}. Connect the CLIP that was "
        "loaded together with the model."
    )


def family_of_clip(clip: CLIP) -> Family:
    """The family whose text encoders a ComfyUI CLIP has.

    Raises:
        UnsupportedModelError: when no family of the table has them.
    """
    for family in FAMILIES:
        if family.owns(clip):
            return family
    kind = type(clip.cond_stage_model).__name__
    raise UnsupportedModelError(
        f"the text encoder {kind} ({_widths(encoder_widths(clip))}) belongs to no supported "
        f"family; supported are {supported_list()}."
    )


def encoder_label(name: str) -> str:
    """What messages call a text encoder."""
    return f"{_CLIP_PREFIX}{name}" if len(name) == 1 else name


def _widths(encoders: dict[str, int]) -> str:
    if not encoders:
        return "none"
    return ", ".join(f"{encoder_label(name)} ({w} wide)" for name, w in sorted(encoders.items()))
