"""Networks with a text cross-attention of their own, and how its projections are found.

A row names the class of `diffusion_model` and the paths of the modules that read the text, never
a list of layers. Modules are judged by `in_features` and `out_features` only, because quantised
layers are not `nn.Linear`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.anima.model import Anima
from comfy.ldm.cosmos.model import GeneralDIT
from comfy.ldm.cosmos.predict2 import MiniTrainDIT
from comfy.ldm.hydit.models import HunYuanDiT
from comfy.ldm.kandinsky5.model import Kandinsky5
from comfy.ldm.lightricks.model import LTXBaseModel, LTXVModel
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.pixart.pixartms import PixArtMS
from comfy.ldm.wan.model import WanModel
from torch import Tensor, nn

from .second_text import SecondText


@dataclass(frozen=True, eq=False)
class FusedPart:
    """The keys' or the values' share of a linear map that makes both.

    Attributes:
        module: the map, D -> `stop` or more.
        start, stop: which of its outputs.
    """

    module: Any
    start: int
    stop: int

    @property
    def in_features(self) -> int:
        """D, the width of what it reads."""
        return int(self.module.in_features)

    @property
    def out_features(self) -> int:
        """d, the width of this share."""
        return self.stop - self.start


@dataclass(frozen=True)
class CrossAttention:
    """The two text projections of one cross-attention layer.

    Attributes:
        name: path of the attention module below `diffusion_model`.
        to_k, to_v: the projection modules (D -> `key_width`, D -> `value_width`), or both a
            `FusedPart` of one module.
    """

    name: str
    to_k: Any
    to_v: Any

    @property
    def input_width(self) -> int:
        """D, the width of what the projections read."""
        return int(self.to_k.in_features)

    @property
    def key_width(self) -> int:
        """d of the key projection."""
        return int(self.to_k.out_features)

    @property
    def value_width(self) -> int:
        """d of the value projection."""
        return int(self.to_v.out_features)

    @property
    def modules(self) -> tuple[Any, ...]:
        """The modules of the projections: two, or one that makes keys and values."""
        if isinstance(self.to_k, FusedPart):
            return (self.to_k.module,)
        return (self.to_k, self.to_v)


@dataclass(frozen=True)
class Network:
    """One class of networks.

    Attributes:
        kind: the class of `diffusion_model`; subclasses are other networks unless `subclasses`.
        attention: matches the whole paths of the modules that read the text.
        projections: what such a module calls its key and its value projection; one name where one
            linear map makes both, keys first.
        subclasses: whether subclasses of `kind` count.
        entry: path of what every encoding passes, token by token, before the projections read it;
            None where they read the encodings themselves.
        adapts: whether the model makes what is read out of the encodings by an adapter of its own,
            before it is called (`query_adapter`).
        unless: names of attributes that make it another network where they are true.
        unpadded: whether prompts are as long as they are, with no mask for padding.
        masked: whether it is told which tokens are words.
        second: where a second encoding is that it reads behind the first one's tokens; it is this
            one then which passes `entry`.
        countable: whether its code can be run without contents, to count memory.
        axes: of a latent, batch and channels included; 5 where time is one of them.
    """

    kind: type[nn.Module]
    attention: str
    projections: tuple[str, ...]
    subclasses: bool = False
    entry: str | None = None
    adapts: bool = False
    unless: tuple[str, ...] = ()
    unpadded: bool = False
    masked: bool = False
    second: SecondText | None = None
    countable: bool = True
    axes: int = 4

    def fits(self, network: Any) -> bool:
        """Whether this is such a network."""
        kind = type(network)
        if not issubclass(kind, self.kind) or not (self.subclasses or kind is self.kind):
            return False
        return not any(getattr(network, name, False) for name in self.unless)

    def cross_attentions(self, network: nn.Module) -> Iterator[CrossAttention]:
        """Every cross-attention over the text, in module order."""
        for name, module in network.named_modules():
            if re.fullmatch(self.attention, name) is None:
                continue
            found = [getattr(module, each, None) for each in self.projections]
            if all(hasattr(linear, "in_features") for linear in found):
                yield _cross_attention(name, found)

    def unreachable(self, network: nn.Module) -> Iterator[tuple[str, str]]:
        """Path and class of modules that read the text through projections of other names."""
        known = {layer.name for layer in self.cross_attentions(network)}
        for name, module in network.named_modules():
            if re.fullmatch(self.attention, name) is not None and name not in known:
                yield name, type(module).__name__

    def text_widths(self, network: nn.Module) -> set[int]:
        """Widths of the encodings that the network is called with; one unless something is odd."""
        if self.entry is None:
            return {layer.input_width for layer in self.cross_attentions(network)}
        entry: list[Any] = list(network.get_submodule(self.entry).modules())
        width = next(int(each.in_features) for each in entry if hasattr(each, "in_features"))
        if self.second is None:
            return {width}
        return {layer.input_width + width for layer in self.cross_attentions(network)}

    def read(self, network: nn.Module, encodings: Tensor) -> Tensor:
        """What the projections read (B, N, D') of encodings (B, N, D), token by token."""
        if self.entry is None:
            return encodings
        entry = network.get_submodule(self.entry)
        if self.second is None:
            return entry(encodings)
        width = next(self.cross_attentions(network)).input_width
        behind = encodings[..., width:]
        of_second = (behind != 0).any(-1, keepdim=True)
        return torch.where(of_second, entry(behind), encodings[..., :width])


def _cross_attention(name: str, linears: list[Any]) -> CrossAttention:
    if len(linears) == 2:
        return CrossAttention(name, *linears)
    (both,) = linears
    half, whole = int(both.out_features) // 2, int(both.out_features)
    return CrossAttention(name, FusedPart(both, 0, half), FusedPart(both, half, whole))


# In the spatio-temporal blocks of video models `time_stack` reads pictures through layers that
# look the same.
UNET = Network(UNetModel, r"(?!.*\.time_stack\.).*(?:^|\.)attn2", ("to_k", "to_v"), subclasses=True)
COSMOS_PREDICT2 = Network(MiniTrainDIT, r"blocks\.\d+\.cross_attn", ("k_proj", "v_proj"), axes=5)
ANIMA = Network(Anima, r"blocks\.\d+\.cross_attn", ("k_proj", "v_proj"), adapts=True, axes=5)
# Pictures have projections of their own there, `k_img` and `v_img`.
WAN = Network(WanModel, r"blocks\.\d+\.cross_attn", ("k", "v"), entry="text_embedding", axes=5)
PIXART = Network(
    *(PixArtMS, r"blocks\.\d+\.cross_attn", ("kv_linear",)),
    entry="y_embedder.y_proj",
    unpadded=True,
    countable=False,
)
MT5 = SecondText(
    kept="conditioning_mt5xl",
    masks=("attention_mask", "attention_mask_mt5xl"),
    read="encoder_hidden_states_t5",
    read_masks=("text_embedding_mask", "text_embedding_mask_t5"),
)
SECOND_TEXTS = (MT5.kept,)
"""What there is in conditionings besides their own encodings, of all rows."""
HUNYUAN_DIT = Network(
    *(HunYuanDiT, r"blocks\.\d+\.attn2", ("kv_proj",)),
    entry="mlp_t5",
    second=MT5,
    countable=False,
)
# Newer ones scale and shift what the projections read in every layer at every step.
LTXV = Network(
    *(LTXVModel, r"transformer_blocks\.\d+\.attn2", ("to_k", "to_v")),
    entry="caption_projection",
    unless=("cross_attention_adaln", "caption_proj_before_connector"),
    masked=True,
    axes=5,
)


def why_not(network: Any) -> str:
    """Why a network with a text cross-attention is in no row, in a few words; "" when unknown."""
    if isinstance(network, LTXBaseModel):
        return "it scales and shifts what the keys and values read in every layer at every step"
    if isinstance(network, Kandinsky5):
        return (
            "blocks of its own mix the text anew at every step, and a concept learns one value for "
            "all steps"
        )
    if isinstance(network, WanModel):
        return "besides the text's cross-attention it reads more than Wan's own models do"
    if isinstance(network, GeneralDIT):
        return "nobody has taught Perfusion where this older Cosmos reads the text"
    return ""
