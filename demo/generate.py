"""Pictures from the small world's model through ComfyUI's own sampler, many prompts at once."""

from typing import Any

import comfy.sample
import torch
from torch import Tensor

from .render import RESOLUTION

STEPS, CFG, SAMPLER, SCHEDULER = 20, 2.0, "dpmpp_2m", "normal"


def encode(clip: Any, prompts: list[str]) -> list:
    """One conditioning whose rows are the encodings of the prompts."""
    rows = {
        p: clip.encode_from_tokens_scheduled(clip.tokenize(p))[0] for p in dict.fromkeys(prompts)
    }
    tensor = torch.cat([rows[p][0] for p in prompts])
    # All that the text encoder says of the prompts, as ComfyUI's own nodes hand it on.
    said = {key: value for _, more in rows.values() for key, value in more.items()}
    said["pooled_output"] = torch.cat([rows[p][1]["pooled_output"] for p in prompts])
    return [[tensor, said]]


@torch.inference_mode()
def generate(
    model: Any, clip: Any, vae: Any, prompts: list[str], seed: int, batch: int = 16
) -> Tensor:
    """Pictures uint8 (n, 3, 64, 64), one a prompt; picture k starts from noise k of ``seed``.

    The same seed gives the same noise whatever the model and the words, so that two lists of
    prompts can be compared picture by picture.
    """
    channels = model.model.latent_format.latent_channels
    side = RESOLUTION // model.model.latent_format.spacial_downscale_ratio
    noise = torch.randn(
        len(prompts), channels, side, side, generator=torch.Generator().manual_seed(seed)
    )
    out = []
    for start in range(0, len(prompts), batch):
        part, some = prompts[start : start + batch], noise[start : start + batch]
        latents = comfy.sample.sample(
            model,
            some,
            STEPS,
            CFG,
            SAMPLER,
            SCHEDULER,
            encode(clip, part),
            encode(clip, [""] * len(part)),
            torch.zeros_like(some),
            disable_pbar=True,
            seed=seed,
        )
        pictures = vae.decode(latents)  # n h w 3 in [0, 1]
        out.append((pictures * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 3, 1, 2).cpu())
    return torch.cat(out)
