"""The structures of UNets with random weights, for benchmarks and for the tests (no channels)."""

from __future__ import annotations

from typing import Any

import torch

# What ComfyUI detects of the published checkpoints, except for the number of channels.
UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "adm_in_channels": None,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "dtype": torch.float32,
}
DEEP: dict[str, Any] = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}
LIGHT: dict[str, Any] = {
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
}
STRUCTURES: dict[str, dict[str, Any]] = {
    "sd1": {**UNET, **DEEP, "context_dim": 768, "use_linear_in_transformer": False},
    # SD1.x without its coarser grids, for what a compiler would take minutes over.
    "small": {
        **UNET,
        "num_res_blocks": [1],
        "channel_mult": [1],
        "transformer_depth": [1],
        "transformer_depth_output": [1, 1],
        "transformer_depth_middle": 1,
        "context_dim": 768,
        "use_linear_in_transformer": False,
    },
    "sd2": {**UNET, **DEEP, "context_dim": 1024, "use_linear_in_transformer": True},
    "sdxl": {
        **UNET,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "context_dim": 2048,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "use_linear_in_transformer": True,
    },
    # SD2 and SDXL with a few layers, for what is asked of many combinations.
    "sd2_light": {
        **UNET,
        **LIGHT,
        "context_dim": 1024,
        "use_linear_in_transformer": True,
    },
    "sdxl_light": {
        **UNET,
        **LIGHT,
        "context_dim": 2048,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "use_linear_in_transformer": True,
    },
    "sd1_light": {**UNET, **LIGHT, "context_dim": 768, "use_linear_in_transformer": False},
    "sdxl_refiner": {
        **UNET,
        **DEEP,
        "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
        "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
        "transformer_depth_middle": 4,
        "context_dim": 1280,
        "adm_in_channels": 2560,
        "num_classes": "sequential",
        "use_linear_in_transformer": True,
    },
}
# Cosmos-Predict2 of 2 billion parameters; Anima's is the same but for the name.
PREDICT2: dict[str, Any] = {
    "image_model": "cosmos_predict2",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 2048,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 1024,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "min_fps": 1,
    "max_fps": 30,
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
    "num_blocks": 28,
    "num_heads": 16,
    "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
}
