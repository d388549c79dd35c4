"""ComfyUI's own models of joint attention and their text encoders, small, with random weights.

Tokenizers are the ones that come with ComfyUI. Gemma's comes with a checkpoint instead; a small one
of its kind is trained on a few sentences.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import comfy.supported_models as supported
import sentencepiece
import torch
from comfy import model_base, model_patcher, sd
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders import (
    aura_t5,
    flux,
    hidream,
    lumina2,
    pixart_t5,
    qwen_image,
    sd3_clip,
    z_image,
)

CPU = torch.device("cpu")
WIDTH = 32
ROPE = [8, 12, 12]
T5 = {"d_model": WIDTH, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2}
LANGUAGE = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
PIECES = 120
SENTENCES = (
    "a photo of a mug on a table and a cup beside it",
    "an old blue bag, a red house, the small cat in a garden",
    "You are an assistant designed to generate superior images <Prompt Start> a thing",
    "an expensive bag and a white mug in the snow with a dog",
)


@dataclass(frozen=True)
class Joint:
    """One kind of model.

    Attributes:
        config: class of ComfyUI's configuration.
        unet: what ComfyUI would detect, small.
        base: makes the BaseModel.
        clip: makes the CLIP.
        linear: path of a map that reads the text; of HiDream's many the first.
        latent: shape of its latents.
    """

    config: type
    unet: dict
    base: Callable
    clip: Callable[[], sd.CLIP]
    linear: str
    latent: tuple[int, ...] = (1, 16, 8, 8)


def build_clip(tokenizer: type, encoder: type, configs: dict, data: dict | None = None) -> sd.CLIP:
    """A CLIP of these classes with small encoders of random weights."""
    options = {f"{name}_model_config": config for name, config in configs.items()}
    made = sd.CLIP(
        ClipTarget(tokenizer, encoder),
        tokenizer_data=data or {},
        model_options={"dtype": torch.float32, **options},
    )
    randomise(made.cond_stage_model, 1)
    return made


SMALL_CLIP = {"num_hidden_layers": 2, "intermediate_size": 64}


def _flux_clip() -> sd.CLIP:
    return build_clip(flux.FluxTokenizer, flux.flux_clip(), {"t5xxl": T5, "clip_l": SMALL_CLIP})


def _chroma_clip() -> sd.CLIP:
    return build_clip(pixart_t5.PixArtTokenizer, pixart_t5.pixart_te(), {"t5xxl": T5})


def _sd3_clip() -> sd.CLIP:
    # All streams are 4096 wide there.
    encoder = sd3_clip.sd3_clip(clip_g=False)
    configs = {"t5xxl": {**T5, "d_model": 4096}, "clip_l": {**SMALL_CLIP, "num_hidden_layers": 3}}
    return build_clip(sd3_clip.SD3Tokenizer, encoder, configs)


def _aura_clip() -> sd.CLIP:
    return build_clip(aura_t5.AuraT5Tokenizer, aura_t5.AuraT5Model, {"pile_t5xl": T5})


def _qwen_clip() -> sd.CLIP:
    return build_clip(qwen_image.QwenImageTokenizer, qwen_image.te(), {"qwen25_7b": LANGUAGE})


def _z_image_clip() -> sd.CLIP:
    return build_clip(z_image.ZImageTokenizer, z_image.te(), {"qwen3_4b": LANGUAGE})


def _lumina_clip() -> sd.CLIP:
    config = {**LANGUAGE, "vocab_size": PIECES}
    data = {"spiece_model": gemma_like_pieces()}
    return build_clip(lumina2.LuminaTokenizer, lumina2.te(), {"gemma2_2b": config}, data)


def _hidream_clip() -> sd.CLIP:
    encoder = hidream.hidream_clip(clip_l=False, clip_g=False)
    return build_clip(hidream.HiDreamTokenizer, encoder, {"t5xxl": T5, "llama": LANGUAGE})


def gemma_like_pieces() -> torch.Tensor:
    """A sentencepiece model as Gemma's: ids 0 to 3 for padding, end, start, unknown; no prefix."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 8),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "context_in_dim": WIDTH,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": ROPE,
    "theta": 10000,
    "qkv_bias": True,
    "vec_in_dim": 768,
    "guidance_embed": False,
    "txt_ids_dims": [],
}
NEXTDIT = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 64,
    "cap_feat_dim": WIDTH,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "qk_norm": True,
    "axes_dims": ROPE,
    "axes_lens": [64, 64, 64],
}

JOINT: dict[str, Joint] = {
    "flux": Joint(supported.Flux, FLUX, model_base.Flux, _flux_clip, "txt_in"),
    "chroma": Joint(
        supported.Chroma,
        {
            **{k: v for k, v in FLUX.items() if k not in ("guidance_embed",)},
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "in_dim": 64,
            "out_dim": 64,
            "hidden_dim": 64,
            "n_layers": 1,
        },
        model_base.Chroma,
        _chroma_clip,
        "txt_in",
    ),
    "sd3": Joint(
        supported.SD3,
        {
            "input_size": None,
            "patch_size": 2,
            "in_channels": 16,
            "depth": 1,
            "adm_in_channels": 2048,
            "pos_embed_scaling_factor": None,
            "pos_embed_max_size": 8,
            "num_patches": 64,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 64},
            },
        },
        model_base.SD3,
        _sd3_clip,
        "context_embedder",
    ),
    "auraflow": Joint(
        supported.AuraFlow,
        {
            "in_channels": 4,
            "patch_size": 2,
            "dim": 64,
            "n_layers": 2,
            "n_double_layers": 1,
            "n_heads": 2,
            "global_conddim": 64,
            "cond_seq_dim": WIDTH,
            "max_seq": 64,
        },
        model_base.AuraFlow,
        _aura_clip,
        "cond_seq_linear",
        (1, 4, 8, 8),
    ),
    "qwen_image": Joint(
        supported.QwenImage,
        {
            "image_model": "qwen_image",
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 1,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": 64,
            "axes_dims_rope": ROPE,
        },
        model_base.QwenImage,
        _qwen_clip,
        "txt_in",
        (1, 16, 1, 8, 8),
    ),
    "lumina2": Joint(
        supported.Lumina2, NEXTDIT, model_base.Lumina2, _lumina_clip, "cap_embedder.1"
    ),
    "z_image": Joint(
        supported.ZImage,
        {
            **NEXTDIT,
            # The time's embedding is this wide there.
            "dim": 256,
            "n_heads": 8,
            "pad_tokens_multiple": 32,
            "z_image_modulation": True,
            "time_scale": 1000.0,
        },
        model_base.Lumina2,
        _z_image_clip,
        "cap_embedder.1",
    ),
    "hidream": Joint(
        supported.HiDream,
        {
            "image_model": "hidream",
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "caption_channels": [WIDTH, WIDTH],
            "text_emb_dim": 2048,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": ROPE,
            "max_resolution": [64, 64],
            "llama_layers": [0, 2],
        },
        model_base.HiDream,
        _hidream_clip,
        "caption_projection.0.linear",
    ),
}


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Weights of a plausible scale; nothing of the picture side of language models."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "visual" in name:
                continue
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            elif parameter.shape[0] > 20000:
                # 1009 different rows, over and over: the whole table would take seconds.
                rows = torch.randn(1009, parameter.shape[1], generator=generator)
                parameter.copy_(rows[torch.arange(parameter.shape[0]) % len(rows)])
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)


def build_joint(name: str) -> model_patcher.ModelPatcher:
    """A MODEL of one kind, on the CPU in fp32."""
    joint = JOINT[name]
    config = joint.config(dict(joint.unet))
    config.set_inference_dtype(torch.float32, None)
    base = joint.base(config, device=CPU)
    randomise(base.diffusion_model, 0)
    positions = dict(base.diffusion_model.named_buffers()).get("pos_embed")
    if positions is not None:
        positions.zero_()  # comes with a checkpoint; without one it is whatever memory held
    return model_patcher.CoreModelPatcher(base, load_device=CPU, offload_device=CPU)
