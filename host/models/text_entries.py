"""Models of joint attention: where the text enters them, through one linear map of its encodings.

Behind that map the text is a stream of its own that changes from block to block; nothing there
reads the encodings any more. An edit can act on the map, with a norm in front of it taken as given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from comfy.ldm.aura.mmdit import MMDiT as AuraFlowNetwork
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from comfy.ldm.hidream.model import HiDreamImageTransformer2DModel
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.model_base import BaseModel
from torch import nn


@dataclass(frozen=True)
class Linear:
    """One linear map that reads text encodings.

    Attributes:
        path: of the module below `diffusion_model`.
        streams: names of the parts of a conditioning that it reads; all of them when None.
    """

    path: str
    streams: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TextEntry:
    """Where the text enters one kind of model.

    Attributes:
        name: identifier.
        label: the name a person knows it by.
        network: the class of `diffusion_model`, exactly.
        linears: gives the maps of such a network.
        streams: names of the parts of a conditioning that its text encoders may give.
        norm: path of the RMS norm in front of the map, None for none.
        has: attributes that tell it from others of its class by not being None.
        lacks: attributes that tell it from others of its class by being None or missing.
        beside: what else tells the model of the text, for people.
    """

    name: str
    label: str
    network: type[nn.Module]
    linears: Callable[[nn.Module], list[Linear]]
    streams: tuple[str, ...]
    norm: str | None = None
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    beside: str = ""

    def fits(self, network: nn.Module) -> bool:
        """Whether this is such a network, by its structure."""
        if type(network) is not self.network:
            return False
        if any(getattr(network, name, None) is None for name in self.has):
            return False
        if any(getattr(network, name, None) is not None for name in self.lacks):
            return False
        return all(has_linear(network, linear.path) for linear in self.linears(network))


def _one(path: str) -> Callable[[nn.Module], list[Linear]]:
    return lambda network: [Linear(path)]


def _hidream_linears(network: nn.Module) -> list[Linear]:
    # One for each block, each reading a layer of Llama; the last one reads T5.
    layers: list[int] = list(getattr(network, "llama_layers", None) or [])
    paths = [f"caption_projection.{at}.linear" for at in range(len(layers) + 1)]
    streams = [*(f"llama.{layer}" for layer in layers), "t5xxl"]
    return [Linear(path, (stream,)) for path, stream in zip(paths, streams, strict=True)]


POOLED = "a pooled CLIP encoding of the prompt that scales and shifts every block"
TEXT_ENTRIES: tuple[TextEntry, ...] = (
    TextEntry(
        *("flux", "Flux.1", Flux, _one("txt_in"), ("t5xxl",)),
        has=("vector_in",),
        lacks=("txt_norm",),
        beside=POOLED,
    ),
    TextEntry("chroma", "Chroma", Chroma, _one("txt_in"), ("t5xxl",)),
    TextEntry(
        *("sd3", "Stable Diffusion 3 and 3.5", OpenAISignatureMMDITWrapper),
        *(_one("context_embedder"), ("clip", "t5xxl")),
        lacks=("context_processor",),
        beside=POOLED,
    ),
    TextEntry("auraflow", "AuraFlow", AuraFlowNetwork, _one("cond_seq_linear"), ("pile_t5xl",)),
    TextEntry(
        *("qwen_image", "Qwen-Image", QwenImageTransformer2DModel, _one("txt_in"), ("qwen25_7b",)),
        norm="txt_norm",
    ),
    TextEntry(
        *("lumina2", "Lumina 2", NextDiT, _one("cap_embedder.1")),
        *(("gemma2_2b", "gemma2_2b superior", "gemma2_2b alignment"), "cap_embedder.0"),
        lacks=("pad_tokens_multiple", "clip_text_pooled_proj", "siglip_embedder"),
    ),
    TextEntry(
        *("z_image", "Z-Image", NextDiT, _one("cap_embedder.1"), ("qwen3_4b",), "cap_embedder.0"),
        has=("pad_tokens_multiple",),
        lacks=("clip_text_pooled_proj", "siglip_embedder"),
    ),
    TextEntry(
        *("hidream", "HiDream I1", HiDreamImageTransformer2DModel, _hidream_linears),
        ("t5xxl", "llama"),
        has=("llama_layers",),
        beside=POOLED,
    ),
)


def has_linear(network: nn.Module, path: str) -> bool:
    """Whether there is a linear map at a path, quantised or not."""
    found: nn.Module | None = network
    for part in path.split("."):
        found = getattr(found, part, None)
    return all(hasattr(found, name) for name in ("in_features", "out_features", "weight"))


def entry_of(model: BaseModel) -> TextEntry | None:
    """The row of the table for a ComfyUI BaseModel, None when it has none."""
    network = getattr(model, "diffusion_model", None)
    if not isinstance(network, nn.Module):
        return None
    return next((entry for entry in TEXT_ENTRIES if entry.fits(network)), None)


def entries_list() -> str:
    """What can be edited where the text enters it, as one readable line."""
    return ", ".join(entry.label for entry in TEXT_ENTRIES)
