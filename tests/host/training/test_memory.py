"""The memory that is announced beside what is really kept."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import pytest
import torch
from comfyui_perfusion.host.models.loaded import Models
from comfyui_perfusion.host.training import memory
from comfyui_perfusion.host.training.activations import kept_by_unet
from comfyui_perfusion.host.training.memory import MemoryEstimate, estimate_memory

from tests.host.training_world import Kept, batch_of, edit_for, view_of

ROWS, SIDE = 2, 128


def world_of(worlds, family, side=SIDE):
    images = torch.rand(ROWS, side, side, 3, generator=torch.Generator().manual_seed(0))
    return worlds.model(family), worlds.clip(family), worlds.vae(), images


def estimate(world, rows=ROWS, dtype=torch.float32, checkpointing=False, side=SIDE):
    latent = side // 8, side // 8
    return estimate_memory(Models(*world[:3]), rows, latent, dtype, checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sdxl_light"])
def test_what_is_announced_is_kept(worlds, family, checkpointing):
    world = world_of(worlds, family)
    config = world[0].model.model_config.unet_config
    announced = kept_by_unet(config, ROWS, SIDE // 8, SIDE // 8, 77, torch.float32)
    with view_of(world, gradient_checkpointing=checkpointing) as view:
        vectors = {n: v.requires_grad_(True) for n, v in view.initial_embeddings().items()}
        with Kept(view.clip.cond_stage_model) as text:
            encoded = view.encode(["a <thing>", "the <thing>"], vectors)
        edit = edit_for(view, encoded)
        with Kept(view._model) as model:
            view.errors(batch_of(0, 1), encoded, edit)
    # Blocks hold on to the encodings besides what autograd is told to keep.
    size = model.size + checkpointing * encoded.encodings.nbytes
    expected = announced.checkpointed if checkpointing else announced.everything
    assert size == pytest.approx(expected, rel=0.1)
    text_weights = comfy.model_management.module_size(world[1].cond_stage_model)
    announced_text = estimate(world, checkpointing=checkpointing).text - text_weights
    # With checkpointing one layer is announced beside what is kept of all, and there are three.
    assert text.size < announced_text < (6 if checkpointing else 1.5) * text.size


@pytest.mark.parametrize("family", ["sd1_light", "sdxl_light"])
def test_checkpointing_precision_and_size_change_what_is_announced(worlds, family):
    world = world_of(worlds, family)
    plain = estimate(world)

    def activations(**changes):
        # Beside the room to work, which is the same for all.
        return estimate(world, **changes).activations - memory._WORKSPACE

    assert activations(checkpointing=True) < 0.6 * activations()
    assert estimate(world, dtype=torch.bfloat16).weights == plain.weights / 2
    assert activations(dtype=torch.bfloat16) == pytest.approx(activations() / 2, rel=0.05)
    assert activations(rows=4) == pytest.approx(2 * activations(), rel=0.05)
    assert activations(side=256) > 3 * activations()
    assert plain.encoding > world[2].patcher.model_size()


def test_sdxl_at_1024_needs_what_it_is_known_to_need(worlds):
    """The structure with its published number of channels, on which no weight is made."""
    config = {**worlds.model("sdxl").model.model_config.unet_config, "model_channels": 320}
    kept = kept_by_unet(config, 1, 128, 128, 77, torch.bfloat16)
    assert 4e9 < kept.everything < 6e9
    assert kept.checkpointed + kept.block < 1.1e9


def test_weights_stored_in_fp8_count_as_they_are_and_as_they_are_cast(worlds):
    model = worlds.new_model("sd1_light")
    world = (model, *world_of(worlds, "sd1_light")[1:])
    plain = estimate(world)
    unet = model.model.diffusion_model
    weights = sum(weight.numel() for weight in unet.parameters())
    unet.to(torch.float8_e4m3fn)
    stored = estimate(world)
    assert stored.weights < plain.weights / 3.9
    assert stored.activations == pytest.approx(plain.activations + 1.1 * 4 * weights, rel=0.01)
    few = estimate(world, checkpointing=True).activations - memory._WORKSPACE
    assert few < (stored.activations - memory._WORKSPACE) / 2


def test_the_statement_says_what_for_and_what_to_do():
    gigabytes = [int(x * 1e9) for x in (1.7, 0.34, 4.06, 2.0, 8.0)]
    found = MemoryEstimate(*gigabytes, device="cuda:0")
    assert found.fits
    assert found.statement() == (
        "training needs about 6.1 GB: weights 1.7, text encoder 0.3, activations 4.1; "
        "8.0 GB free on cuda:0"
    )
    scarce = replace(found, free=int(5e9))
    assert not scarce.fits
    assert "5.0 GB free on cuda:0, which may not be enough: switch gradient" in scarce.statement()
    assert replace(found, encoding=int(9e9)).total == int(9e9)


def test_the_free_memory_is_that_of_the_device(worlds):
    found = estimate(world_of(worlds, "sd1_light"))
    assert found.device == "cpu"
    assert found.free == pytest.approx(comfy.model_management.get_free_memory(), rel=0.2)
    assert found.fits
