"""Models of the published shapes with random weights, and concepts that fit them."""

from __future__ import annotations

from inprocess import load_pack

load_pack()

import comfy.supported_models as supported  # noqa: E402
import torch  # noqa: E402
from comfy import model_base, model_patcher, sd, sd1_clip, sdxl_clip  # noqa: E402
from comfy.supported_models_base import ClipTarget  # noqa: E402
from comfyui_perfusion.host.models.families import cross_attentions, family_of  # noqa: E402
from comfyui_perfusion.perfusion import Concept  # noqa: E402

from benchmarks._structures import STRUCTURES  # noqa: E402

PUBLISHED_CHANNELS = 320


def random_model(
    family: str,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    disable_dynamic: bool = False,
) -> model_patcher.ModelPatcher:
    """A MODEL of a family ("sd1" or "sdxl") whose weights are noise of a plausible scale."""
    config_class = supported.SDXL if family == "sdxl" else supported.SD15
    settings = {**STRUCTURES[family], "model_channels": channels, "dtype": dtype}
    config = config_class(settings)
    config.set_inference_dtype(dtype, None)
    if family == "sdxl":
        base = model_base.SDXL(config, model_base.ModelType.EPS, device=device)
    else:
        base = model_base.BaseModel(config, model_base.ModelType.EPS, device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in base.diffusion_model.parameters():
            if parameter.ndim < 2:
                parameter.zero_()
            elif parameter.numel():
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    kind = model_patcher.ModelPatcher if disable_dynamic else model_patcher.CoreModelPatcher
    patcher = kind(base, load_device=device, offload_device=device)
    # What lets ComfyUI make the model a second time, as its checkpoint loaders do.
    patcher.cached_patcher_init = (random_model, (family, channels, device, dtype))
    return patcher


def text_encoder(family: str, layers: int | None = None) -> sd.CLIP:
    """A family's CLIP with random weights, of the published depth unless told otherwise."""
    tokenizer, encoder = {
        "sd1": (sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
        "sdxl": (sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
    }[family]
    fewer = {} if layers is None else {"num_hidden_layers": layers}
    options = {f"clip_{name}_model_config": fewer for name in "lg"}
    clip = sd.CLIP(
        ClipTarget(tokenizer, encoder), model_options={"dtype": torch.float32, **options}
    )
    with torch.no_grad():
        for parameter in clip.cond_stage_model.parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0 if parameter.ndim else 4.6)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return clip


def random_concepts(model: model_patcher.ModelPatcher, count: int) -> list[Concept]:
    """Concepts with random contents that fit a model."""
    generator = torch.Generator().manual_seed(1)
    family = family_of(model.model)
    concepts = []
    for at in range(count):
        i = torch.randn(family.width, generator=generator)
        concepts.append(
            Concept(
                family=family.name,
                placeholder=f"<{at}>",
                superclass="cat",
                embeddings={
                    name: torch.randn(width, generator=generator)
                    for name, width in family.vectors.items()
                },
                i=i,
                u=i / i.square().sum(),
                superclass_encoding=torch.randn(family.width, generator=generator),
                o_v={
                    layer.name: torch.randn(layer.value_width, generator=generator)
                    for layer in cross_attentions(model.model)
                },
            )
        )
    return concepts
