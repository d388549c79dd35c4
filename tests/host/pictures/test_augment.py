"""Versions of training pictures: what they show, and that the mask goes with the picture."""

from __future__ import annotations

import pytest
import torch
from comfyui_perfusion.host.pictures.augment import render, subject_box, version_boxes
from comfyui_perfusion.host.pictures.buckets import Box

WHOLE = Box(0, 0, 100, 60)


def boxes(subject=None, crop=0.0, zoom_out=0.0, count=40, seed=0, box=WHOLE):
    generator = torch.Generator().manual_seed(seed)
    return version_boxes(box, subject, count, crop, zoom_out, generator)


def picture_and_mask():
    """A picture whose red is its mask, so that the two can be compared afterwards."""
    mask = torch.zeros(60, 100)
    mask[20:41, 30:71] = torch.linspace(0.2, 1, 41)
    return mask[..., None].repeat(1, 1, 3), mask


def test_the_first_version_is_the_picture_itself():
    assert boxes(crop=0.5, zoom_out=0.5)[0] == WHOLE


def test_the_same_seed_makes_the_same_versions():
    assert boxes(crop=0.3, zoom_out=0.3) == boxes(crop=0.3, zoom_out=0.3)
    assert boxes(crop=0.3, zoom_out=0.3) != boxes(crop=0.3, zoom_out=0.3, seed=1)


def test_closer_versions_stay_within_the_picture_and_cut_off_no_more_than_asked():
    made = boxes(crop=0.4)
    assert all(box.left >= 0 and box.right <= 100 and box.width >= 60 for box in made)
    assert all(box.top >= 0 and box.bottom <= 60 and box.height >= 36 for box in made)
    assert min(box.width for box in made) < 66
    assert len({(box.left, box.top) for box in made}) > 30
    assert all(abs(box.width / box.height - 100 / 60) < 0.04 for box in made)


def test_wider_versions_hold_the_whole_picture_and_no_more_background_than_asked():
    made = boxes(zoom_out=0.5)
    assert all(box.left <= 0 and box.right >= 100 and box.width <= 200 for box in made)
    assert all(box.top <= 0 and box.bottom >= 60 for box in made)
    assert max(box.width for box in made) > 180


def test_closer_versions_hold_the_masked_thing():
    subject = Box(70, 5, 20, 20)
    for box in boxes(subject, crop=0.6):
        assert box.left <= 70
        assert box.right >= 90
        assert box.top <= 5
        assert box.bottom >= 25


def test_a_thing_larger_than_the_version_fills_it():
    subject = Box(10, 0, 80, 60)
    assert all(
        box.left >= 10 and box.right <= 90
        for box in boxes(subject, crop=0.6)[1:]
        if box.width <= 80
    )


def test_the_subject_is_where_the_mask_is_strong_within_the_part_in_use():
    mask = torch.zeros(60, 100)
    mask[10:20, 30:50] = 0.8
    mask[40:50, 80:90] = 0.3
    assert subject_box(mask, WHOLE) == Box(30, 10, 20, 10)
    assert subject_box(mask, Box(60, 0, 40, 60)) == Box(80, 40, 10, 10)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "box", [WHOLE, Box(17, 5, 63, 47), Box(20, 10, 50, 30), Box(0, 30, 80, 30)]
)
def test_the_mask_is_where_its_thing_is_in_the_picture(box, flip):
    picture, mask = picture_and_mask()
    part, weights = render(picture, mask, box, (50, 30), flip)
    assert part.shape == (30, 50, 3)
    assert weights.shape == (30, 50)
    # Two ways to resize agree but for ringing at the edges.
    assert float((part[..., 0] - weights).abs().mean()) < 0.012
    assert float(part.min()) >= 0
    assert float(part.max()) <= 1


def test_a_part_of_the_right_size_is_taken_bit_for_bit():
    picture = torch.rand(60, 100, 3, generator=torch.Generator().manual_seed(0))
    part, weights = render(picture, None, Box(7, 3, 50, 40), (50, 40), False)
    assert torch.equal(part, picture[3:43, 7:57])
    assert weights is None


def test_mirrored_is_mirrored_from_left_to_right():
    picture = torch.rand(60, 100, 3, generator=torch.Generator().manual_seed(0))
    part, weights = render(picture, picture[..., 0], WHOLE, (100, 60), True)
    assert torch.equal(part, picture.flip(1))
    assert torch.equal(weights, picture[..., 0].flip(1))


def test_beyond_the_edges_is_the_mirror_image_with_no_weight():
    picture = torch.rand(6, 10, 3, generator=torch.Generator().manual_seed(0))
    box = Box(-4, -2, 20, 12)
    part, weights = render(picture, torch.ones(6, 10), box, (20, 12), False)
    assert torch.equal(part[2:8, 4:14], picture)
    assert torch.equal(part[2:8, :4], picture[:, :4].flip(1))
    assert torch.equal(part[8:, 4:14], picture[2:].flip(0))
    inside = torch.zeros(12, 20)
    inside[2:8, 4:14] = 1
    assert torch.equal(weights, inside)


def test_background_without_a_mask_is_refused():
    with pytest.raises(ValueError, match="expected a mask for Box"):
        render(torch.rand(6, 10, 3), None, Box(-1, 0, 10, 6), (10, 6), False)


def test_details_too_fine_for_the_size_become_their_mean():
    stripes = torch.zeros(64, 64, 3)
    stripes[:, ::2] = 1
    part, _ = render(stripes, None, Box(0, 0, 64, 64), (8, 8), False)
    torch.testing.assert_close(part, torch.full_like(part, 0.5), rtol=0, atol=0.02)
