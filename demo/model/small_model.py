"""The small world's text-to-image model, built of ComfyUI's own classes from one weight file."""

from collections.abc import Mapping
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from torch import Tensor

from .small_autoencoder import COLORS, DOWNSCALE, LATENT_CHANNELS, SmallAutoencoder

TEXT_CONFIG = {
    "num_hidden_layers": 3,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
    "vocab_size": 49408,
}
UNET_CONFIG = {
    "image_size": 32,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": TEXT_CONFIG["hidden_size"],
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "adm_in_channels": None,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
CHANNELS = 96
"""Width of the UNet where no weights say otherwise."""
TIMESTEPS = 720
"""Noise levels in use, of the schedule's 1000: up to sigma 14.8, about where SD's schedule ends."""
TOKENS = "text.tokens"
"""Key of the token ids whose embedding rows the weight file carries."""
_TOKEN_ROWS = "transformer.text_model.embeddings.token_embedding.weight"


class SmallLatents(comfy.latent_formats.LatentFormat):
    """Latents of ``SmallAutoencoder``: already of mean 0 and about variance 1."""

    latent_channels = LATENT_CHANNELS
    spacial_downscale_ratio = DOWNSCALE


class SmallWorld(comfy.supported_models_base.BASE):
    """Model configuration: v-prediction, and a schedule with more noise than SD's at its end,
    because small pictures survive noise longer."""

    unet_extra_config: ClassVar = {"num_heads": -1, "num_head_channels": 32}
    sampling_settings: ClassVar = {"linear_start": 0.00085, "linear_end": 0.03}
    latent_format = SmallLatents
    supported_inference_dtypes: ClassVar = [torch.float32]
    memory_usage_factor = 0.5


class SmallTextModel(comfy.sd1_clip.SD1ClipModel):
    """SD1's text encoder class at a small size, last layer with the final norm."""


def _cut(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v.float() for k, v in weights.items() if k.startswith(prefix)}


def _load(module: torch.nn.Module, weights: Mapping[str, Tensor], part: str) -> None:
    missing, unexpected = module.load_state_dict(weights, strict=False)
    missing = [
        k
        for k in missing
        if "logit_scale" not in k and "text_projection" not in k and "model_sampling" not in k
    ]
    if missing or unexpected:
        raise ValueError(
            f"the small world's {part} does not fit this version of the pack: "
            f"missing {missing[:3]}, not expected {list(unexpected)[:3]}; "
            "get weights and code from the same release"
        )


def build_unet(
    channels: int = CHANNELS, dtype: torch.dtype = torch.float32
) -> comfy.model_base.BaseModel:
    """The diffusion model with weights as its constructor leaves them (not initialised).

    ``channels`` is its width, a multiple of 32.
    """
    config = SmallWorld(dict(UNET_CONFIG, model_channels=channels, dtype=dtype))
    config.set_inference_dtype(dtype, None)
    return comfy.model_base.BaseModel(config, comfy.model_base.ModelType.V_PREDICTION, device="cpu")


def _make_model(
    weights: Mapping[str, Tensor], disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    first = weights.get("unet.input_blocks.0.0.weight")
    model = build_unet(CHANNELS if first is None else len(first))
    _load(model.diffusion_model, _cut(weights, "unet."), "UNet")
    # Beyond sigma 15 nothing of a picture is left, and samplers would waste half their steps there.
    model.model_sampling.set_sigmas(model.model_sampling.sigmas[:TIMESTEPS])
    patcher_class = (
        comfy.model_patcher.ModelPatcher
        if disable_dynamic
        else comfy.model_patcher.CoreModelPatcher
    )
    patcher = patcher_class(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    # A clone that wants weights of its own (training does) builds the model anew from this.
    patcher.cached_patcher_init = (_make_model, (weights,))
    return patcher


def _make_clip(weights: Mapping[str, Tensor], disable_dynamic: bool = False) -> comfy.sd.CLIP:
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, SmallTextModel)
    clip = comfy.sd.CLIP(
        target,
        model_options={"dtype": torch.float32, "clip_l_model_config": TEXT_CONFIG},
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_make_clip_patcher, (weights,))
    text = _cut(weights, "text.")
    rows = text.pop("rows")
    # Words the world never heard mean nothing: the mean of those it knows.
    table = rows.mean(0, keepdim=True).repeat(TEXT_CONFIG["vocab_size"], 1)
    table[weights[TOKENS].long()] = rows
    text.pop("tokens", None)
    text[_TOKEN_ROWS] = table
    _load(clip.cond_stage_model.clip_l, text, "text encoder")
    return clip


def _make_clip_patcher(
    weights: Mapping[str, Tensor], disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    return _make_clip(weights, disable_dynamic).patcher


def _make_vae(weights: Mapping[str, Tensor]) -> comfy.sd.VAE:
    # VAE() knows its networks by their keys; it starts as the simplest one and gets ours.
    vae: Any = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    model = SmallAutoencoder().train(False).requires_grad_(False)
    _load(model, _cut(weights, "vae."), "autoencoder")
    vae.first_stage_model = model.to(vae.vae_dtype)
    vae.latent_channels = LATENT_CHANNELS
    vae.downscale_ratio = vae.upscale_ratio = DOWNSCALE
    vae.memory_used_encode = lambda shape, dtype: 64 * 4 * shape[2] * shape[3]
    # Three or four maps of votes and shares at a time.
    scale = 4 * 4 * COLORS
    vae.memory_used_decode = lambda shape, dtype: scale * DOWNSCALE**2 * shape[2] * shape[3]
    vae.patcher = comfy.model_patcher.CoreModelPatcher(
        model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    return vae


def load_small_model(weights: Mapping[str, Tensor]) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of the small world as ComfyUI's own objects.

    ``weights`` has keys ``unet.*``, ``text.*`` (with ``text.tokens``, the ids (n,) whose embedding
    rows ``text.rows`` (n, 128) are known) and ``vae.*``. Raises ValueError when they do not fit.
    """
    return _make_model(weights), _make_clip(weights), _make_vae(weights)
