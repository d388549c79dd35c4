"""Sizes of training pictures: about the resolution's area, hardly anything cut, none squashed."""

from __future__ import annotations

import pytest
from comfyui_perfusion.host.pictures.buckets import Box, fit

SIZES = [(512, 512), (1024, 768), (768, 1024), (600, 400), (1920, 1080), (333, 517), (4000, 700)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resolution", [256, 512, 1000, 1024])
def test_sides_are_multiples_of_64_and_the_area_that_of_the_resolution(size, resolution):
    _, (width, height) = fit(size, resolution, 8)
    assert width % 64 == height % 64 == 0
    assert 0.7 * resolution**2 <= width * height <= resolution**2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resolution", [0, 256, 512, 1024])
def test_nothing_is_squashed_and_little_is_cut_off(size, resolution):
    box, (width, height) = fit(size, resolution, 8)
    assert abs(box.width / width - box.height / height) <= 1.0 / min(width, height)
    assert 0 <= box.left <= box.right <= size[0]
    assert 0 <= box.top <= box.bottom <= size[1]
    assert box.width == size[0] or box.height == size[1] or resolution == 0
    assert box.width * box.height >= 0.7 * size[0] * size[1]


def test_a_picture_of_the_resolution_is_left_alone():
    assert fit((512, 512), 512, 8) == (Box(0, 0, 512, 512), (512, 512))


def test_without_a_resolution_only_the_edges_are_cut_as_the_vae_would():
    assert fit((36, 34), 0, 8) == (Box(2, 1, 32, 32), (32, 32))
    assert fit((48, 48), 0, 6) == (Box(0, 0, 48, 48), (48, 48))


def test_small_resolutions_and_odd_latents_go_by_the_vaes_pixels_per_latent():
    assert fit((200, 100), 48, 8)[1] == (64, 32)
    assert fit((48, 48), 48, 6)[1] == (48, 48)
    assert fit((90, 60), 48, 6)[1] == (54, 36)


def test_a_resolution_that_is_no_multiple_is_brought_to_one():
    assert fit((800, 800), 500, 8)[1] == (448, 448)


def test_sides_are_never_below_64():
    box, size = fit((4000, 200), 128, 8)
    assert size == (448, 64)
    assert box == Box(1300, 0, 1400, 200)


@pytest.mark.parametrize(
    ("size", "resolution", "message"),
    [
        ((7, 300), 0, "at least 8x8, the VAE's smallest, found 7x300"),
        ((300, 300), 4, "resolution of 0 or at least 8.*found 4"),
    ],
)
def test_what_is_smaller_than_a_latent_is_refused(size, resolution, message):
    with pytest.raises(ValueError, match=message):
        fit(size, resolution, 8)
