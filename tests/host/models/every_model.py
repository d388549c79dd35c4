"""Every model that ComfyUI supports, as its own class builds it: real networks without memory.

A network is built on the meta device, at the published size wherever the class has one. What
ComfyUI's class does not know by itself is in `SETTINGS`: what ComfyUI detects of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.supported_models as supported
import torch
from comfy.ldm.audio.embedders import NumberConditioner
from comfy.model_base import BaseModel

from benchmarks._structures import DEEP, PREDICT2, STRUCTURES, UNET

META = torch.device("meta")


@dataclass(frozen=True)
class Built:
    """How a class is built.

    Attributes:
        settings: what ComfyUI detects besides what is in the class.
        state: weights that the class wants to see.
        device: that its network can be made on.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    state: Callable[[], dict[str, torch.Tensor]] = dict
    device: torch.device = META


def unet(structure: str = "sd2", **changes: Any) -> Built:
    """One of ComfyUI's UNets with the channels of the published ones."""
    return Built({**STRUCTURES[structure], "model_channels": 320, **changes})


def video_unet(adm: int) -> Built:
    """Stable Video Diffusion and its kin."""
    return Built(
        {
            **UNET,
            **DEEP,
            "in_channels": 8,
            "model_channels": 320,
            "context_dim": 1024,
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": adm,
            "extra_ff_mix_layer": True,
            "use_spatial_context": True,
            "merge_strategy": "learned_with_images",
            "merge_factor": 0.0,
            "video_kernel_size": [3, 1, 1],
            "use_temporal_resblock": True,
            "use_temporal_attention": True,
            "disable_temporal_crossattention": False,
        }
    )


FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "vec_in_dim": 768,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
# Chroma keeps neither of the two.
CHROMA = {key: value for key, value in FLUX.items() if key not in ("guidance_embed", "vec_in_dim")}
CHROMA |= {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072}
CHROMA |= {"hidden_dim": 5120, "n_layers": 5, "vec_in_dim": None}
HUNYUAN_VIDEO = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": 768,
    "axes_dim": [16, 56, 56],
    "meanflow": False,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 20,
    "depth_single_blocks": 40,
    "theta": 256,
    "qkv_bias": True,
    "byt5": False,
    "guidance_embed": True,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
HUNYUAN_15 = {**HUNYUAN_VIDEO, "vec_in_dim": None, "byt5": True, "use_cond_type_embedding": True}
HUNYUAN_15 |= {"vision_in_dim": 1152, "context_in_dim": 3584, "meanflow_sum": True}
COSMOS = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 4096,
    "num_blocks": 28,
    "num_heads": 32,
    "concat_padding_mask": True,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": False,
    "block_config": "FA-CA-MLP",
    "block_x_format": "THWBD",
    "affline_emb_norm": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
NEXTDIT = {"patch_size": 2, "in_channels": 16, "qk_norm": True}
LUMINA = {
    **NEXTDIT,
    "dim": 2304,
    "cap_feat_dim": 2304,
    "n_layers": 26,
    "n_heads": 24,
    "n_kv_heads": 8,
    "axes_dims": [32, 32, 32],
    "axes_lens": [300, 512, 512],
    "ffn_dim_multiplier": 4.0,
}
Z_IMAGE = {
    **NEXTDIT,
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
HIDREAM = {
    "attention_head_dim": 128,
    "axes_dims_rope": [64, 32, 32],
    "caption_channels": [4096, 4096],
    "max_resolution": [128, 128],
    "in_channels": 16,
    "llama_layers": [*range(32), *[31] * 16],
    "num_attention_heads": 20,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "num_layers": 16,
    "num_single_layers": 32,
    "out_channels": 16,
    "patch_size": 2,
    "text_emb_dim": 2048,
}
WAN = {"dim": 1536, "num_heads": 12, "ffn_dim": 8960, "num_layers": 30, "cross_attn_norm": True}
COG = {"sample_height": 4, "sample_width": 4, "sample_frames": 5}  # tables of positions are slow


def _camera_projection() -> dict[str, torch.Tensor]:
    return {
        "cc_projection.weight": torch.zeros(768, 772),
        "cc_projection.bias": torch.zeros(768),
    }


def _seconds(*names: str, fourier: str = "learned") -> Callable[[], dict[str, torch.Tensor]]:
    def state() -> dict[str, torch.Tensor]:
        made = NumberConditioner(768, fourier_features_type=fourier).state_dict()
        return {
            f"conditioner.conditioners.{name}.{key}": value
            for name in names
            for key, value in made.items()
        }

    return state


SETTINGS: dict[str, Built] = {
    "LotusD": unet(adm_in_channels=4, num_classes="sequential"),
    "Stable_Zero123": Built(unet("sd1", in_channels=8).settings, _camera_projection),
    "SD15_instructpix2pix": unet("sd1", in_channels=8),
    "SD15": unet("sd1"),
    "SD20": unet(),
    "SD21UnclipL": unet(adm_in_channels=1536, num_classes="sequential"),
    "SD21UnclipH": unet(adm_in_channels=2048, num_classes="sequential"),
    "SDXL_instructpix2pix": unet("sdxl", in_channels=8),
    "SDXLRefiner": unet("sdxl_refiner", model_channels=384),
    "SDXL": unet("sdxl"),
    "SSD1B": unet(
        "sdxl",
        transformer_depth=[0, 0, 2, 2, 4, 4],
        transformer_depth_output=[0, 0, 0, 1, 1, 2, 10, 4, 4],
        transformer_depth_middle=-1,
    ),
    "Segmind_Vega": unet(
        "sdxl",
        transformer_depth=[0, 0, 1, 1, 2, 2],
        transformer_depth_output=[0, 0, 0, 1, 1, 1, 2, 2, 2],
        transformer_depth_middle=-1,
    ),
    "KOALA_700M": unet(
        "sdxl",
        num_res_blocks=[1, 1, 1],
        transformer_depth=[0, 2, 5],
        transformer_depth_output=[0, 0, 2, 2, 5, 5],
        transformer_depth_middle=-2,
    ),
    "KOALA_1B": unet(
        "sdxl",
        num_res_blocks=[1, 1, 1],
        transformer_depth=[0, 2, 6],
        transformer_depth_output=[0, 0, 2, 2, 6, 6],
        transformer_depth_middle=6,
    ),
    "SD_X4Upscaler": unet(
        model_channels=256,
        in_channels=7,
        channel_mult=[1, 2, 2, 4],
        transformer_depth=[0, 0, 1, 1, 1, 1, 1, 1],
        transformer_depth_output=[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ),
    "SVD_img2vid": video_unet(768),
    "SV3D_u": video_unet(256),
    "SV3D_p": video_unet(1280),
    "StableAudio": Built(
        {"timestep_features_type": "learned"}, _seconds("seconds_start", "seconds_total")
    ),
    "StableAudio3": Built(
        {"timestep_features_type": "expo", "global_cond_type": "adaLN"},
        _seconds("seconds_total", fourier="expo"),
    ),
    "SD3": Built(
        {
            "patch_size": 2,
            "depth": 24,
            "input_size": None,
            "adm_in_channels": 2048,
            "num_patches": 36864,
            "pos_embed_max_size": 192,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 1536},
            },
        }
    ),
    "PixArtSigma": Built({"micro_condition": False, "model_max_length": 300}),
    "HunyuanDiT1": Built(
        {"depth": 40, "hidden_size": 1408, "mlp_ratio": 4.3637}
        | {"size_cond": True, "use_style_cond": True}
    ),
    "Flux": Built(FLUX),
    "FluxInpaint": Built({**FLUX, "in_channels": 96}),
    "FluxSchnell": Built({**FLUX, "guidance_embed": False}),
    "LongCatImage": Built({**FLUX, "context_in_dim": 3584}),
    "Flux2": Built(
        {
            **FLUX,
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "context_in_dim": 15360,
            "hidden_size": 6144,
            "mlp_ratio": 3.0,
            "num_heads": 48,
            "depth": 8,
            "depth_single_blocks": 48,
            "axes_dim": [32, 32, 32, 32],
            "theta": 2000,
            "qkv_bias": False,
            "ops_bias": False,
            "vec_in_dim": None,
            "global_modulation": True,
            "mlp_silu_act": True,
            "txt_ids_dims": [3],
        }
    ),
    "Chroma": Built(CHROMA),
    "ChromaRadiance": Built(
        {
            **CHROMA,
            "in_channels": 3,
            "out_channels": 3,
            "patch_size": 16,
            "nerf_hidden_size": 64,
            "nerf_mlp_ratio": 4,
            "nerf_depth": 4,
            "nerf_max_freqs": 8,
            "nerf_tile_size": 512,
            "nerf_final_head_type": "conv",
            "nerf_embedder_dtype": torch.float32,
            "use_x0": False,
            "use_sequential_txt_ids": False,
        }
    ),
    "GenmoMochi": Built(
        {
            "depth": 48,
            "patch_size": 2,
            "num_heads": 24,
            "hidden_size_x": 3072,
            "hidden_size_y": 1536,
            "mlp_ratio_x": 4.0,
            "mlp_ratio_y": 4.0,
            "in_channels": 12,
            "qk_norm": True,
            "qkv_bias": False,
            "attend_to_padding": False,
            "use_t5": True,
            "t5_feat_dim": 4096,
            "t5_token_length": 256,
        }
    ),
    "HunyuanVideo": Built(HUNYUAN_VIDEO),
    "HunyuanVideoI2V": Built({**HUNYUAN_VIDEO, "in_channels": 33}),
    "HunyuanVideoSkyreelsI2V": Built({**HUNYUAN_VIDEO, "in_channels": 32}),
    "HunyuanVideo15": Built({**HUNYUAN_15, "in_channels": 65}),
    "HunyuanVideo15_SR_Distilled": Built(HUNYUAN_15),
    "HunyuanImage21": Built(
        {**HUNYUAN_VIDEO, "in_channels": 64, "out_channels": 64, "context_in_dim": 3584}
        | {"patch_size": [1, 1], "axes_dim": [64, 64], "byt5": True}
    ),
    "HunyuanImage21Refiner": Built({**HUNYUAN_VIDEO, "in_channels": 128, "out_channels": 64}),
    "CosmosT2V": Built(COSMOS),
    "CosmosI2V": Built(COSMOS),
    "CosmosT2IPredict2": Built(PREDICT2),
    "CosmosI2VPredict2": Built(PREDICT2),
    "Anima": Built(PREDICT2),
    "Lumina2": Built(LUMINA),
    "ZImage": Built(Z_IMAGE),
    "ZImagePixelSpace": Built({**Z_IMAGE, "in_channels": 3, "patch_size": 16}),
    "HiDream": Built(HIDREAM),
    "SeedVR2": Built(
        {"norm_eps": 1e-5, "num_layers": 32, "mlp_type": "swiglu", "vid_out_norm": True}
    ),
    "CogVideoX_Inpaint": Built(COG),
    "CogVideoX_I2V": Built(COG),
    "CogVideoX_T2V": Built(COG),
    "WAN22_T2V": Built(WAN),
    "WAN21_CausalAR_T2V": Built(WAN),
    "WAN21_T2V": Built(WAN),
    "WAN21_Vace": Built({**WAN, "vace_layers": 15, "vace_in_dim": 96}),
    # Its table of levels is multiplied out while it is built, which no meta tensor can be.
    "ACEStep15": Built(
        {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 1,
            "encoder_hidden_size": 64,
            "encoder_num_heads": 1,
            "encoder_intermediate_size": 64,
            "num_dit_layers": 1,
        },
        device=torch.device("cpu"),
    ),
}


def build(name: str, changes: dict[str, Any] | None = None) -> BaseModel:
    """A model of one of ComfyUI's classes as its loader would make it, with other settings."""
    kind = getattr(supported, name)
    built = SETTINGS.get(name, Built())
    config = kind({**built.settings, **kind.unet_config, **(changes or {})})
    config.set_inference_dtype(torch.bfloat16, None)
    return config.get_model(built.state(), "", device=built.device)


def names() -> list[str]:
    """The classes of all models that ComfyUI knows, in its order."""
    return [kind.__name__ for kind in supported.models]
