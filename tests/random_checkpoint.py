"""Writes a checkpoint file that ComfyUI's own loader takes for Stable Diffusion 1.5.

    python -m tests.random_checkpoint FILE

Random weights; the true text encoder (which the loader knows in one size only), a VAE of TAESD's
form, and of the UNet's grids only the finest, with the true width. 250 MB.
"""

from __future__ import annotations

import sys
from pathlib import Path

from inprocess import load_pack

load_pack()

import torch  # noqa: E402
from comfy import ops, sd1_clip  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
}


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Weights of a plausible scale, so that signals neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                scale = 0.5 if "embedding" in name else parameter[0].numel() ** -0.5
                parameter.normal_(0, scale, generator=generator)


def weights() -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under the names of the published file, in fp16."""
    unet = UNetModel(**UNET, dtype=torch.float32, operations=ops.disable_weight_init)
    clip = sd1_clip.SD1ClipModel(device="cpu", dtype=torch.float32)
    vae = TAESD(latent_channels=4)
    for seed, network in enumerate((unet, clip, vae)):
        randomise(network, seed)
    with torch.no_grad():
        vae.vae_scale.fill_(1.0)
    parts = {"model.diffusion_model.": unet.state_dict(), "first_stage_model.": vae.state_dict()}
    text = clip.clip_l.transformer.state_dict()
    parts["cond_stage_model.transformer."] = text
    return {
        prefix + name: tensor.detach().to(torch.float16).contiguous().clone()
        for prefix, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def main(file: Path) -> None:
    """Write the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights(), file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
