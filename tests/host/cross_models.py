"""ComfyUI's own transformers with a text cross-attention, small, with random weights.

One row for each family. The text is narrower than it really is, and the family's row in the table
with it: `narrow_families` puts those rows in place for a while. Tokenizers are those that come with
ComfyUI; UMT5's comes with a checkpoint instead, and a small one of its kind is trained here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import comfy.ops
import comfy.supported_models as supported
import sentencepiece
import torch
from comfy import model_base, model_patcher, sd
from comfy.ldm.anima.model import LLMAdapter
from comfy.text_encoders import anima, cosmos, hydit, lt, pixart_t5, wan
from comfyui_perfusion.host.models.families import FAMILIES, Family, family_named

from benchmarks._structures import PREDICT2
from tests.host.closed_form.joint_models import (
    CPU,
    LANGUAGE,
    SENTENCES,
    T5,
    WIDTH,
    build_clip,
    randomise,
)


@dataclass(frozen=True)
class Cross:
    """One family.

    Attributes:
        config: class of ComfyUI's configuration.
        unet: what ComfyUI would detect, but small.
        full: what it would detect of a published model.
        base: makes the BaseModel.
        clip: makes the CLIP.
        layers: (count, d) of the published model.
        latent: shape of the small latents.
        locks: the key locks it takes.
        widths: of the small text encoders, where they are not all `WIDTH`.
        shrink: makes parts small whose size no configuration tells.
    """

    config: type
    unet: dict
    full: dict
    base: Callable
    clip: Callable[[], sd.CLIP]
    layers: tuple[int, int]
    latent: tuple[int, ...] = (1, 16, 1, 8, 8)
    locks: tuple[str, ...] = ("twin", "local", "global")
    widths: tuple[int, ...] = ()
    shrink: Callable = lambda network: None


def pieces() -> torch.Tensor:
    """A sentencepiece model as UMT5's: ids 0 and 1 for padding and end, a space before words."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 8),
        model_writer=model,
        model_type="bpe",
        vocab_size=120,
        pad_id=0,
        eos_id=1,
        bos_id=-1,
        unk_id=2,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


def _cosmos_clip() -> sd.CLIP:
    return build_clip(cosmos.CosmosT5Tokenizer, cosmos.te(), {"t5xxl": T5})


def _anima_clip() -> sd.CLIP:
    return build_clip(anima.AnimaTokenizer, anima.te(), {"qwen3_06b": LANGUAGE})


def _small_adapter(network: torch.nn.Module) -> None:
    network.llm_adapter = LLMAdapter(
        *(WIDTH, WIDTH, WIDTH),
        num_layers=2,
        num_heads=2,
        device=CPU,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )


def _wan_clip() -> sd.CLIP:
    config = {**T5, "vocab_size": 120}
    data = {"spiece_model": pieces()}
    return build_clip(wan.WanT5Tokenizer, wan.te(), {"umt5xxl": config}, data)


def _pixart_clip() -> sd.CLIP:
    return build_clip(pixart_t5.PixArtTokenizer, pixart_t5.pixart_te(), {"t5xxl": T5})


def _ltxv_clip() -> sd.CLIP:
    return build_clip(lt.LTXVT5Tokenizer, lt.ltxv_te(), {"t5xxl": T5})


def _hunyuan_clip() -> sd.CLIP:
    bert = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    mt5 = {**T5, "d_model": MT5_WIDTH, "vocab_size": 120}
    configs = {"hydit_clip": bert, "mt5xl": mt5}
    data = {"mt5xl.spiece_model": pieces()}
    return build_clip(hydit.HyditTokenizer, hydit.HyditModel, configs, data)


SMALL_COSMOS = {
    "model_channels": 64,
    "num_blocks": 2,
    "num_heads": 2,
    "adaln_lora_dim": 8,
    "crossattn_emb_channels": WIDTH,
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 5120,
    "out_dim": 16,
    "num_heads": 40,
    "ffn_dim": 13824,
    "num_layers": 40,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "in_dim": 16,
    "text_dim": 4096,
}
SMALL_WAN = {"dim": 64, "num_heads": 2, "ffn_dim": 96, "num_layers": 2, "text_dim": WIDTH}

PIXART = {
    "image_model": "pixart_sigma",
    "micro_condition": False,
    "input_size": 128,
    "pe_interpolation": 2,
    "num_heads": 16,
    "hidden_size": 1152,
    "depth": 28,
    "caption_channels": 4096,
    "model_max_length": 300,
}
SMALL_PIXART = {"num_heads": 2, "hidden_size": 96, "depth": 2, "caption_channels": WIDTH}
PIXART_ALPHA = {"image_model": "pixart_alpha", "micro_condition": True}
LTXV = {
    "image_model": "ltxv",
    "num_layers": 28,
    "attention_head_dim": 64,
    "cross_attention_dim": 2048,
}
SMALL_LTXV = {
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "cross_attention_dim": 64,
    "caption_channels": WIDTH,
}

MT5_WIDTH = 48
HUNYUAN_DIT = {"image_model": "hydit", "depth": 40, "hidden_size": 1408, "mlp_ratio": 4.3637}
SMALL_HUNYUAN_DIT = {
    "depth": 4,
    "hidden_size": 64,
    "num_heads": 2,
    "text_states_dim": WIDTH,
    "text_states_dim_t5": MT5_WIDTH,
    # As newer ones have.
    "size_cond": True,
    "use_style_cond": True,
}

CROSS: dict[str, Cross] = {
    "cosmos_predict2": Cross(
        supported.CosmosT2IPredict2,
        {**PREDICT2, **SMALL_COSMOS},
        PREDICT2,
        model_base.CosmosPredict2,
        _cosmos_clip,
        (28, 2048),
    ),
    "anima": Cross(
        supported.Anima,
        {**PREDICT2, **SMALL_COSMOS, "image_model": "anima"},
        {**PREDICT2, "image_model": "anima"},
        model_base.Anima,
        _anima_clip,
        (28, 2048),
        shrink=_small_adapter,
    ),
    "wan": Cross(
        supported.WAN21_T2V,
        {**WAN, **SMALL_WAN},
        WAN,
        model_base.WAN21,
        _wan_clip,
        (40, 5120),
        locks=("twin",),
    ),
    "pixart_sigma": Cross(
        supported.PixArtSigma,
        {**PIXART, **SMALL_PIXART},
        PIXART,
        model_base.PixArt,
        _pixart_clip,
        (28, 1152),
        (1, 4, 40, 40),
        locks=("twin",),
    ),
    "pixart_alpha": Cross(
        supported.PixArtAlpha,
        {**PIXART, **SMALL_PIXART, **PIXART_ALPHA},
        {**PIXART, **PIXART_ALPHA},
        model_base.PixArt,
        _pixart_clip,
        (28, 1152),
        (1, 4, 40, 40),
        locks=("twin",),
    ),
    "hunyuan_dit": Cross(
        supported.HunyuanDiT,
        {**HUNYUAN_DIT, **SMALL_HUNYUAN_DIT},
        HUNYUAN_DIT,
        model_base.HunyuanDiT,
        _hunyuan_clip,
        (40, 1408),
        (1, 4, 8, 8),
        locks=("twin",),
        widths=(WIDTH, MT5_WIDTH),
    ),
    "ltxv": Cross(
        supported.LTXV,
        {**LTXV, **SMALL_LTXV},
        LTXV,
        model_base.LTXV,
        _ltxv_clip,
        (28, 2048),
        (1, 128, 1, 8, 8),
        locks=("twin",),
    ),
}


META = torch.device("meta")
REAL = tuple(FAMILIES)


def narrow_families() -> contextlib.AbstractContextManager[None]:
    """Let the families' text be as narrow as the small models'."""
    return _table([_narrow(row) if row.name in CROSS else row for row in REAL])


def real_families() -> contextlib.AbstractContextManager[None]:
    """Within the former: the families' text as it is."""
    return _table(list(REAL))


@contextlib.contextmanager
def _table(rows: list[Family]) -> Iterator[None]:
    before = list(FAMILIES)
    FAMILIES[:] = rows
    try:
        yield
    finally:
        FAMILIES[:] = before


def _narrow(family: Family) -> Family:
    encoders, queries = (dict.fromkeys(each, WIDTH) for each in (family.encoders, family.queries))
    widths = CROSS[family.name].widths
    if widths:
        encoders = dict(zip(family.encoders, widths, strict=True))
    width = sum(widths) or WIDTH
    return dataclasses.replace(family, encoders=encoders, queries=queries, width=width)


def build_cross(name: str, seed: int = 0) -> model_patcher.ModelPatcher:
    """A small MODEL of a family, on the CPU in fp32."""
    base = base_of(name, CROSS[name].unet, CPU)
    CROSS[name].shrink(base.diffusion_model)
    randomise(base.diffusion_model, seed)
    return model_patcher.CoreModelPatcher(base, load_device=CPU, offload_device=CPU)


def full_size(name: str) -> model_base.BaseModel:
    """The published model's structure, without contents."""
    return base_of(name, CROSS[name].full, META)


def base_of(name: str, unet: dict, device: torch.device) -> model_base.BaseModel:
    """ComfyUI's BaseModel of a configuration."""
    row = CROSS[name]
    config = row.config(dict(unet))
    config.set_inference_dtype(torch.float32, None)
    return row.base(config, device=device)


def family_row(name: str) -> Family:
    """The table's row."""
    found = family_named(name)
    assert found is not None
    return found
