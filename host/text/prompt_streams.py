"""What a conditioning is made of: whose tokens, and where their encodings are in it.

SD1.x, SD2 and SDXL have one section of CLIP tokens (`text_encoders`). Newer models have one or more
streams: T5 tokens, a language model's tokens within a template, or both behind each other. What a
model's own adapter makes of a stream has the adapter's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy.text_encoders.aura_t5 import AuraT5Model
from comfy.text_encoders.flux import FluxClipModel
from comfy.text_encoders.hidream import HiDreamTEModel
from comfy.text_encoders.lumina2 import LuminaModel
from comfy.text_encoders.pixart_t5 import PixArtT5XXL
from comfy.text_encoders.qwen_image import QwenImageTEModel
from comfy.text_encoders.sd3_clip import SD3ClipModel
from comfy.text_encoders.z_image import ZImageTEModel
from comfy_extras.nodes_lumina2 import CLIPTextEncodeLumina2
from torch import Tensor, nn

from ...perfusion.closed_form.even_sample import Rows
from ..models.families import Family, UnsupportedModelError
from ..models.query_adapter import QUERIES, adapter_of
from .twin import untwined

Encoded = Mapping[str, Any]
"""What `CLIP.encode_from_tokens(return_dict=True)` gives: "cond" (1, N, D) and more."""


@dataclass(frozen=True)
class Stream:
    """The tokens of one tokenizer and the encodings that belong to them.

    Attributes:
        name: as the table of text entries calls it.
        key: of the tokens in what the CLIP's tokenizer gives, and its name in that tokenizer.
        rows: picks the encodings (N, D) out of what was encoded for so many tokens; fewer than
            tokens when the text encoder cuts its template off in front.
        before: what stands in front of every prompt, a space behind it included.
        masked: whether the model is told which tokens are words, and reads no other.
    """

    name: str
    key: str
    rows: Callable[[Encoded, int], Rows]
    before: str = ""
    masked: bool = False


def family_stream(family: Family, model: ModelPatcher) -> Stream:
    """The stream that a family's keys and values read, for families whose prompts are no sections.

    Args:
        family: of the model.
        model: is loaded where it adapts encodings itself.
    """
    (name,) = family.positions
    rows = _adapted(model) if family.network.adapts else _whole
    return Stream(name, name, rows, masked=family.network.masked)


def streams_of(clip: CLIP) -> tuple[Stream, ...]:
    """The streams of a CLIP's conditionings, by the class of its text encoders.

    Raises:
        UnsupportedModelError: for other text encoders, naming the class.
    """
    model = clip.cond_stage_model
    if isinstance(model, FluxClipModel | PixArtT5XXL):
        return (Stream("t5xxl", "t5xxl", _whole),)
    if isinstance(model, AuraT5Model):
        return (Stream("pile_t5xl", "pile_t5xl", _whole),)
    if isinstance(model, QwenImageTEModel):
        return (Stream("qwen25_7b", "qwen25_7b", _whole),)
    if isinstance(model, ZImageTEModel):
        return (Stream("qwen3_4b", "qwen3_4b", _whole),)
    if isinstance(model, LuminaModel) and hasattr(model, "gemma2_2b"):
        return tuple(_lumina_streams())
    if isinstance(model, SD3ClipModel):
        return tuple(_sd3_streams(model))
    if isinstance(model, HiDreamTEModel):
        return tuple(_hidream_streams(model))
    raise UnsupportedModelError(
        f"the text encoder {type(model).__name__} belongs to no model that can be edited; connect "
        "the CLIP that was loaded together with the model"
    )


def tokenizer_of(clip: CLIP, stream: Stream) -> Any:
    """ComfyUI's SDTokenizer that cuts a stream's text."""
    for name in (stream.key, f"clip_{stream.key}"):
        found = getattr(clip.tokenizer, name, None)
        if found is not None:
            return found
    raise UnsupportedModelError(
        f"the CLIP has no tokenizer {stream.key!r}; connect the CLIP that was loaded together with "
        "the model"
    )


def _whole(encoded: Encoded, count: int) -> Rows:
    cond: Tensor = encoded["cond"]
    return cond[0]


def _adapted(model: ModelPatcher) -> Callable[[Encoded, int], Rows]:
    def rows(encoded: Encoded, count: int) -> Rows:
        # Loaded again if the text encoder took its place meanwhile.
        adapter = adapter_of(model)
        assert adapter is not None
        prompt, _ = untwined(encoded["cond"])
        with torch.no_grad():
            made = adapter.prompt(prompt, encoded, encoded.get(QUERIES, ()))
        # Behind the tokens there is nothing but zeros.
        return made[0, :count].cpu()

    return rows


def _lumina_streams() -> list[Stream]:
    # The plain encode node gives the prompt alone, Lumina's own one puts a sentence in front of it.
    prompts = CLIPTextEncodeLumina2.SYSTEM_PROMPT
    named = [
        Stream(f"gemma2_2b {name}", "gemma2_2b", _whole, f"{text} <Prompt Start> ")
        for name, text in prompts.items()
    ]
    return [Stream("gemma2_2b", "gemma2_2b", _whole), *named]


def _sd3_streams(model: nn.Module) -> list[Stream]:
    # CLIP's tokens (l and g side by side) come first, T5's behind them.
    def first(encoded: Encoded, count: int) -> Rows:
        return _whole(encoded, count)[:count]

    def last(encoded: Encoded, count: int) -> Rows:
        return _whole(encoded, count)[-count:]

    found = []
    clips = [key for key in ("l", "g") if getattr(model, f"clip_{key}", None) is not None]
    if clips:
        found.append(Stream("clip", clips[0], first))
    if getattr(model, "t5xxl", None) is not None:
        found.append(Stream("t5xxl", "t5xxl", last))
    return found


def _hidream_streams(model: nn.Module) -> list[Stream]:
    def layer(at: int) -> Callable[[Encoded, int], Rows]:
        return lambda encoded, count: encoded["conditioning_llama3"][0, at]

    found = []
    if getattr(model, "t5xxl", None) is not None:
        found.append(Stream("t5xxl", "t5xxl", _whole))
    llama: Any = getattr(model, "llama", None)
    if llama is not None:
        found += [Stream(f"llama.{at}", "llama", layer(at)) for at in range(llama.num_layers)]
    return found
