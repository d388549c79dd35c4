"""Memory of a training step on transformers: what is kept, what is announced, and checkpointing."""

from __future__ import annotations

import functools

import comfy.ldm.hydit.attn_layers
import comfy.ldm.pixart.blocks
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfyui_perfusion.host.models.families import FAMILIES
from comfyui_perfusion.host.models.loaded import Models
from comfyui_perfusion.host.pictures.training_images import TrainingImages
from comfyui_perfusion.host.training.activations import kept_by_blocks, kept_by_transformer
from comfyui_perfusion.host.training.memory import estimate_memory
from comfyui_perfusion.host.training.view import training_view
from comfyui_perfusion.perfusion import Direction
from comfyui_perfusion.perfusion.gated.gate import Gate
from comfyui_perfusion.perfusion.gated.twin_lock import TwinProjections, twin_gates, twin_inputs

from tests.host.cross_models import (
    CROSS,
    build_cross,
    family_row,
    full_size,
    narrow_families,
    real_families,
)
from tests.host.training_world import Kept, batch_of

CALCULATED = [name for name in CROSS if not family_row(name).network.countable]
COUNTED = [name for name in CROSS if name not in CALCULATED]
SIDE = 40


@pytest.fixture(scope="module", autouse=True)
def _narrow():
    with narrow_families():
        yield


@pytest.fixture(scope="module")
def models():
    return functools.cache(lambda name: (build_cross(name), CROSS[name].clip()))


def step(model, clip, name, checkpointing, side):
    """The bytes that a step keeps, its loss, and the gradients of what learns."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, CROSS[name].latent[1], side, side)
    latents = [torch.randn(shape, generator=generator) for _ in range(2)]
    pictures = TrainingImages(latents, None, [(8 * side, 8 * side)] * 2, "0" * 16)
    words = "mug", "<thing>"
    with training_view(
        *(model, clip, pictures, *words), gradient_checkpointing=checkpointing
    ) as view:
        prompts = ["a photo of a <thing>"] * 2
        named, twin = view.encode_twins(prompts, view.random_embeddings())
        i = named.encodings[named.mask].double().mean(0)
        gates = twin_gates(named.encodings, twin.encodings, [Direction(i, i, Gate(0.7, 0.2))])
        inputs = twin_inputs(twin.encodings, gates)
        values = {
            layer: torch.randn(1, width, generator=generator).requires_grad_(True)
            for layer, width in view.layers.items()
        }
        edit = TwinProjections(twin.encodings, inputs, gates, values)
        with Kept(view._model) as kept:
            loss = view.errors(batch_of(0, 1), twin, edit).mean()
        loss.backward()
        return kept.size, loss.detach(), {name: each.grad for name, each in values.items()}


@pytest.mark.parametrize("name", CROSS)
def test_gradient_checkpointing_keeps_less_and_learns_the_same(name, models):
    side = CROSS[name].latent[-1]
    (whole, loss, expected), (less, again, found) = (
        step(*models(name), name, checkpointing, side) for checkpointing in (False, True)
    )
    assert less < whole / 2
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", CALCULATED)
def test_what_cannot_be_counted_is_calculated_and_has_room_for_what_is_kept(
    name, models, monkeypatch
):
    # These two do not ask which attention to train with; GPUs have a fused one.
    for module in (comfy.ldm.hydit.attn_layers, comfy.ldm.pixart.blocks):
        monkeypatch.setattr(module, "optimized_attention", attention_pytorch)
    network = models(name)[0].model.diffusion_model
    tokens = SIDE**2 // network.patch_size**2
    found = kept_by_blocks(len(network.blocks), 2, tokens, network.hidden_size, torch.float32)
    everything, *_ = step(*models(name), name, False, SIDE)
    less, *_ = step(*models(name), name, True, SIDE)
    assert found.everything / 2 < everything < found.everything
    assert less < found.checkpointed + found.block


@pytest.mark.parametrize("name", CROSS)
def test_an_estimate_is_made_for_every_family_and_half_as_much_in_bf16(name, models, worlds):
    model, clip = models(name)
    every = Models(model, clip, worlds.vae())

    def estimate(dtype=torch.float32, checkpointing=False):
        return estimate_memory(every, 1, (SIDE, SIDE), dtype, checkpointing, text_learns=False)

    plain = estimate()
    assert plain.weights == 4 * sum(w.numel() for w in model.model.diffusion_model.parameters())
    assert estimate(torch.bfloat16).weights == plain.weights / 2
    assert estimate(torch.bfloat16).activations < plain.activations
    assert estimate(checkpointing=True).activations < plain.activations


@pytest.mark.parametrize("name", COUNTED)
def test_memory_is_counted_at_full_size_and_less_of_it_with_checkpointing(name):
    with real_families():
        network = full_size(name).diffusion_model
        width = next(family.width for family in FAMILIES if family.name == name)
        axes = next(family.network.axes for family in FAMILIES if family.name == name)
    latent = (1, CROSS[name].latent[1], *[1] * (axes - 4), 64, 64)
    kept = kept_by_transformer(network, CROSS[name].full, latent, (512, width), torch.bfloat16)
    count, d = CROSS[name].layers
    # Of every layer at least the values of the text are kept, which learn.
    assert kept.everything > count * 512 * d * 2
    assert kept.checkpointed + kept.block < kept.everything / 4
