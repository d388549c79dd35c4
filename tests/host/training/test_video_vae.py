"""From photos to pictures and videos on models of videos, each with its own kind of VAE."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import comfy.model_management
import pytest
import torch
from comfy import sd
from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE
from comfy.ldm.wan.vae import WanVAE
from comfyui_perfusion.host.training.options import TrainingOptions
from comfyui_perfusion.nodes.concepts import (
    PerfusionApplyConcepts,
    PerfusionLoadConcept,
    PerfusionSaveConcept,
)
from comfyui_perfusion.nodes.training import PerfusionCovariance, PerfusionTrainConcept

from tests.host.cross_models import CROSS, narrow_families, randomise
from tests.host.cross_oracle import Small
from tests.host.small_training import use_folder

CAPTIONS = "a blue bag\na mug on a table\nan old house in a garden\nthe small cat and a dog"
FRAMES = (1, 5)


@pytest.fixture(scope="module", autouse=True)
def _narrow():
    with narrow_families():
        yield


def wan_vae() -> sd.VAE:
    """Wan 2.1's, as ComfyUI detects it: 16 channels on 1/8 of a side and 1/4 of the time."""
    network = WanVAE(dim=8, z_dim=16, num_res_blocks=2, temperal_downsample=[False, True, True])
    randomise(network, 3)
    return sd.VAE(sd=dict(network.state_dict()))


def ltxv_vae() -> sd.VAE:
    """LTX-Video's, its size told by the file's metadata: 128 channels on 1/32, 1/8 of the time."""
    blocks = [["res_x", 1], *([["compress_all", 1], ["res_x", 1]] * 3)]
    config = {"dims": 3, "latent_channels": 128, "blocks": blocks, "patch_size": 4}
    config |= {"norm_layer": "pixel_norm", "latent_log_var": "uniform"}
    config |= {"encoder_base_channels": 8, "decoder_base_channels": 8}
    network = VideoVAE(config=config)
    randomise(network, 3)
    statistics = network.per_channel_statistics
    for name, value in statistics.named_buffers():
        value.fill_(1.0 if "std" in name else 0.0)
    metadata = {"config": json.dumps({"vae": config})}
    return sd.VAE(sd=dict(network.state_dict()), metadata=metadata)


# family -> its VAE, the pixels of a latent's cell, and frames of a video of 5 latent frames.
VIDEO: dict[str, tuple[Callable[[], sd.VAE], int, int]] = {
    "wan": (wan_vae, 8, 17),
    "cosmos_predict2": (wan_vae, 8, 17),
    "anima": (wan_vae, 8, 17),
    "ltxv": (ltxv_vae, 32, 33),
}


@pytest.mark.parametrize("name", VIDEO)
def test_photos_become_a_concept_that_pictures_and_videos_are_drawn_with(
    worlds, name, tmp_path, monkeypatch
):
    use_folder(monkeypatch, tmp_path)
    build, cell, frames = VIDEO[name]
    small, vae = Small(name, worlds), build()
    before = worlds.state(small.model)
    random = torch.Generator().manual_seed(0)
    photos = [torch.rand(1, 64, width, 3, generator=random) for width in (64, 96)]
    options = TrainingOptions(
        **{"sample_every": 2, "sample_steps": 1, "checkpoint_every": 2},
        templates=("a photo of a {}",),
        sample_prompts=("a photo of a {}",),
    )
    with torch.inference_mode():
        covariance = PerfusionCovariance.execute(small.clip, CAPTIONS, model=small.model).args[0]
        concept, _, samples, _, report = PerfusionTrainConcept.execute(
            *([small.model], [small.clip], [vae], photos, ["mug"], ["<thing>"]),
            *([2], [1], [0.05], [0.006], [0]),
            covariance=[covariance],
            options=[options],
        ).args
        PerfusionSaveConcept.execute(concept, "it")
        loaded = PerfusionLoadConcept.execute("it_00001_.safetensors").args[0]
    assert concept.family == loaded.family == name
    assert report.startswith("2 steps")
    # Before the first step and after the last, of the first photo's size.
    assert samples.shape == (1, 64, 2 * 64, 3)
    assert torch.isfinite(samples).all()
    with torch.inference_mode():
        model, clip = PerfusionApplyConcepts.execute(
            small.model, small.clip, {"concept0": loaded}
        ).args
    prompts = {
        text: [worlds.encode(clip, text), worlds.encode(clip, "")]
        for text in ("a photo of a <thing>", "a photo of a mug")
    }
    stock = [worlds.encode(small.clip, text) for text in ("a photo of a mug", "")]
    for count in FRAMES:
        shape = (1, CROSS[name].latent[1], count, 2, 2)
        small.row = dataclasses.replace(small.row, latent=shape)
        base = small.sample(small.model, *stock)
        named, other = (small.sample(model, *each) for each in prompts.values())
        assert named.shape == shape
        assert torch.equal(other, base)
        assert not torch.allclose(named, base, atol=1e-3)
        with torch.inference_mode():
            video = vae.decode(named)
        assert video.shape == (1, 1 if count == 1 else frames, 2 * cell, 2 * cell, 3)
        assert torch.isfinite(video).all()
    comfy.model_management.unload_all_models()
    assert worlds.same(worlds.state(small.model), before)
