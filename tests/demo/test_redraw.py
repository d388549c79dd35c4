"""Pictures drawn again by the model: what the decoder learns from must be the picture it shows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inprocess import load_pack

load_pack()

from comfyui_perfusion.demo import redraw  # noqa: E402
from comfyui_perfusion.demo.model.small_autoencoder import SmallAutoencoder  # noqa: E402
from comfyui_perfusion.demo.model.small_model import CHANNELS, build_unet  # noqa: E402
from comfyui_perfusion.demo.networks import Words, alphas_cumprod, build_networks  # noqa: E402
from comfyui_perfusion.demo.train_decoder import wrong_pixels  # noqa: E402
from comfyui_perfusion.demo.train_encoder import to_input  # noqa: E402
from comfyui_perfusion.demo.train_state import forget_drawn  # noqa: E402
from comfyui_perfusion.demo.world import world_weights  # noqa: E402

COUNT = 24


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    return {name: value.float() for name, value in world_weights().items()}


@pytest.fixture(scope="module")
def networks(weights: dict[str, Any]) -> nn.ModuleDict:
    """The shipped model in the trainer's own layout; the names of things are made up anew."""
    torch.manual_seed(0)
    out = build_networks(Words(), CHANNELS)
    state = {k: v for k, v in weights.items() if k.startswith("unet.")}
    state["text.text_model.embeddings.token_embedding.weight"] = weights["text.rows"]
    for name, value in weights.items():
        if name.startswith("text.transformer."):
            state["text." + name.removeprefix("text.transformer.")] = value
    missing, unexpected = out.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("names.") or "text_projection" in name for name in missing)
    return out.requires_grad_(False)


@pytest.fixture(scope="module")
def autoencoder(weights: dict[str, Any]) -> SmallAutoencoder:
    model = SmallAutoencoder().requires_grad_(False)
    model.load_state_dict({k[4:]: v for k, v in weights.items() if k.startswith("vae.")})
    return model


def test_what_is_drawn_again_shows_the_picture_it_is_kept_with(
    networks: nn.ModuleDict, autoencoder: SmallAutoencoder, tmp_path: Path
) -> None:
    schedule = alphas_cumprod(build_unet().model_sampling)
    first, again = (
        redraw.drawn_chunk(tmp_path, networks, schedule, autoencoder, -1, "cpu", COUNT)
        for _ in range(2)
    )
    assert torch.equal(first.latents, again.latents)
    kept = len(first.pictures)
    # Things that only a name tells do not come back: these names mean nothing.
    assert 4 <= kept < COUNT
    assert first.pictures.shape == (kept, 64, 64)
    assert first.masks.shape == (kept, 2, 8, 8)
    drawn = wrong_pixels(autoencoder, first, first.latents)
    exact = autoencoder.encode(to_input(first.pictures))
    assert drawn < 0.15
    assert not torch.allclose(first.latents.float(), exact, atol=0.05)
    mirrored = redraw.Drawn(first.pictures.flip(-1), first.masks.flip(-1), first.latents)
    assert wrong_pixels(autoencoder, mirrored, first.latents) > 2 * drawn


def test_drawing_from_hardly_any_noise_changes_hardly_anything(
    networks: nn.ModuleDict, autoencoder: SmallAutoencoder
) -> None:
    schedule = alphas_cumprod(build_unet().model_sampling)
    pictures = redraw.load_chunk(-1)[0][:4]
    latents = autoencoder.encode(to_input(pictures))
    nothing = torch.zeros(4, 8, 128), torch.zeros(4, 8, 128)
    t = torch.full((4,), 3)
    found = redraw.redraw(networks, schedule, latents * schedule[3].sqrt(), t, nothing, nothing)
    assert float((found - latents).square().mean()) < 0.01


def test_a_wall_of_another_colour_is_another_picture_and_a_thing_with_faults_is_not() -> None:
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 24, 8, 8, generator=g)
    masks = torch.zeros(3, 2, 8, 8)
    masks[:, 0, 3:6, 2:5] = 1.0
    found = latents.clone()
    found[0] += 0.2 * (masks[0].amax(0) == 0)  # the wall, a little
    found[1] += 0.5 * masks[1].amax(0)  # the thing, more
    found[2] += 0.9 * masks[2].amax(0)  # and so much that it is another thing
    assert redraw.is_faithful(found, latents, masks).tolist() == [False, True, False]


def test_a_model_that_learns_on_leaves_no_decoder_of_before(tmp_path: Path) -> None:
    stale = ("drawn-1.pt", "drawn120.pt", "decoder_state.pt", "autoencoder.pt")
    kept = ("base_state.pt", "encoder.pt", "judge.pt", "latents120.pt")
    for name in (*stale, *kept):
        (tmp_path / name).touch()
    forget_drawn(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
