"""How much memory training will need, said before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from comfy.sd import CLIP

from ..models.families import encoder_models, family_of
from ..models.loaded import Models, pixels_per_latent
from ..models.networks import UNET
from .activations import kept_by_blocks, kept_by_transformer, kept_by_unet
from .checkpointing import BLOCKS
from .private_copy import stored_plainly

_GIGABYTE = 1e9
_TOKENS = 77
_LONG_TEXT = 512
# Gradients of the newest activations beside the activations themselves, and the rest of a step.
_GRADIENTS = 4
# What allocators and libraries take besides; the bytes are those of a measured step on a CPU.
_MARGIN = 1.1
_WORKSPACE = 250_000_000


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training is expected to need besides what is in memory now.

    Attributes:
        weights: the private copy of the model.
        text: the private copy of the text encoders and what they keep of a step.
        activations: what the model keeps of a step, its gradients, and room to work.
        encoding: the VAE while pictures are encoded, before the rest is needed.
        free: what the device can make room for.
        device: its name.
    """

    weights: int
    text: int
    activations: int
    encoding: int
    free: int
    device: str

    @property
    def total(self) -> int:
        """The most that is needed at one time."""
        return max(self.weights + self.text + self.activations, self.encoding)

    @property
    def fits(self) -> bool:
        """Whether there is room for it, as far as can be told."""
        return self.total <= self.free

    def statement(self) -> str:
        """One sentence for people, with a remedy when there is not enough."""
        remedy = "" if self.fits else _REMEDY
        return (
            f"training needs about {_gb(self.total)} GB: weights {_gb(self.weights)}, text encoder "
            f"{_gb(self.text)}, activations {_gb(self.activations)}; {_gb(self.free)} GB free on "
            f"{self.device}{remedy}"
        )


_REMEDY = (
    ", which may not be enough: switch gradient checkpointing on, lower the batch size or the "
    "resolution, or use bf16"
)


def estimate_memory(
    models: Models,
    rows: int,
    latent: tuple[int, int],
    dtype: torch.dtype,
    checkpointing: bool,
    text_learns: bool = True,
) -> MemoryEstimate:
    """Estimate for `rows` latents (height, width) computed together in a dtype.

    Without `text_learns` the text encoders keep nothing for a backward pass.

    The activations are counted by running the network's own structure without contents; the text
    encoders' are calculated from their sizes. What cannot be known is left to a margin of 10 % and
    a quarter of a gigabyte.
    Takes about two seconds for SDXL.
    """
    model, clip, vae = models.model, models.clip, models.vae
    unet = model.model.diffusion_model
    config = model.model.model_config.unet_config
    family = family_of(model.model)
    if family.network is UNET:
        kept = kept_by_unet(config, rows, *latent, _TOKENS, dtype)
    else:
        channels = model.model.latent_format.latent_channels
        frames = [1] * (family.network.axes - 4)
        # More channels are pictures to begin with, which are small beside everything else.
        shape = (rows, int(config.get("in_dim", channels)), *frames, *latent)
        if family.network.countable:
            kept = kept_by_transformer(unet, config, shape, (_LONG_TEXT, family.width), dtype)
        else:
            tokens = latent[0] * latent[1] // unet.patch_size**2
            kept = kept_by_blocks(len(unet.blocks), rows, tokens, unet.hidden_size, dtype)
    numbers = sum(weight.numel() for weight in unet.parameters())
    weights = numbers * dtype.itemsize
    activations = kept.checkpointed + kept.block if checkpointing else kept.everything
    if not stored_plainly(unet):
        weights = comfy.model_management.module_size(unet)
        # Cast where they are used, and kept so; with checkpointing only those of one block.
        parts = unet.input_blocks if family.network is UNET else _blocks_of(unet)
        largest = max(sum(w.numel() for w in part.parameters()) for part in parts)
        activations += dtype.itemsize * (largest if checkpointing else numbers)
    activations += _GRADIENTS * kept.tensor
    factor = pixels_per_latent(vae)
    frame = [1] * (vae.latent_dim - 2)
    pixels = (1, 3, *frame, latent[0] * factor, latent[1] * factor)
    return MemoryEstimate(
        weights=weights,
        text=comfy.model_management.module_size(clip.cond_stage_model)
        + (int(_kept_by_text(clip, rows, checkpointing) * _MARGIN) if text_learns else 0),
        activations=int(activations * _MARGIN) + _WORKSPACE,
        encoding=int(vae.memory_used_encode(pixels, vae.vae_dtype)) + vae.patcher.model_size(),
        free=free_memory(model.load_device),
        device=str(model.load_device),
    )


def _blocks_of(network: torch.nn.Module) -> list[torch.nn.Module]:
    return [block for block in network.modules() if isinstance(block, BLOCKS)]


def free_memory(device: torch.device) -> int:
    """Bytes free on a device, counting loaded models that would make room."""
    loaded = comfy.model_management.current_loaded_models
    others = sum(each.model_loaded_memory() for each in loaded if each.device == device)
    if device.type == "cpu":
        # There they stay where they are.
        others = 0
    free: Any = comfy.model_management.get_free_memory(device)
    return int(free) + others


def _kept_by_text(clip: CLIP, rows: int, checkpointing: bool) -> int:
    """Bytes the text encoders keep of a step; they compute in fp32 whatever they are stored in."""
    total = 0
    for encoder in encoder_models(clip).values():
        layers = encoder.transformer.text_model.encoder.layers
        first = layers[0]
        width, inner = first.mlp.fc1.in_features, first.mlp.fc1.out_features
        heads = first.self_attn.heads
        # What enters the two norms, q, k, v and the attention's output; the hidden layer before and
        # after its activation; the attention map. Inputs of frozen layers are not kept.
        layer = rows * _TOKENS * (6 * width + 2 * inner + heads * _TOKENS)
        if any(weight.dtype is not torch.float32 for weight in first.parameters()):
            layer += sum(weight.numel() for weight in first.parameters())
        inputs = rows * _TOKENS * width
        total += layer + len(layers) * inputs if checkpointing else len(layers) * layer
    return total * torch.float32.itemsize


def _gb(count: int) -> str:
    return f"{count / _GIGABYTE:.1f}"
