"""A transformer of Anima's width with few blocks and random weights, and its text encoder."""

from __future__ import annotations

from inprocess import load_pack

load_pack()

import comfy.supported_models as supported  # noqa: E402
import torch  # noqa: E402
from comfy import model_base, model_patcher, sd  # noqa: E402
from comfy.supported_models_base import ClipTarget  # noqa: E402
from comfy.text_encoders import anima  # noqa: E402

from ._structures import PREDICT2  # noqa: E402

BLOCKS = 2  # of 28: every further one costs the same, with the pack and without
TOKENS = 512
"""What Anima pads its text to."""


def random_anima(
    blocks: int, device: torch.device, dtype: torch.dtype
) -> model_patcher.ModelPatcher:
    """A MODEL of Anima's shape whose weights are noise of a plausible scale."""
    config = supported.Anima({**PREDICT2, "image_model": "anima", "num_blocks": blocks})
    config.set_inference_dtype(dtype, None)
    base = model_base.Anima(config, device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in base.diffusion_model.parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
            elif parameter.numel():
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return model_patcher.CoreModelPatcher(base, load_device=device, offload_device=device)


def anima_text_encoder() -> sd.CLIP:
    """Anima's CLIP of the published width with one layer and a part of the vocabulary."""
    config = {"num_hidden_layers": 1, "vocab_size": 32000}
    target = ClipTarget(anima.AnimaTokenizer, anima.te())
    options = {"dtype": torch.float32, "qwen3_06b_model_config": config}
    clip = sd.CLIP(target, model_options=options)
    with torch.no_grad():
        for parameter in clip.cond_stage_model.parameters():
            parameter.fill_(0.02)
    return clip
