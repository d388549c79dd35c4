"""From attention to maps, and from maps to masks of pictures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from perfusion.masks.attention import affinity, joined, propagate, word_share
from perfusion.masks.soft_masks import MaskOptions, follow_edges, iou, otsu, overlay, soft_masks


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def disc(side, x, y, radius):
    """1 within a disc of a square, in shares of its side."""
    line = (torch.arange(side) + 0.5) / side
    return ((line[None] - x) ** 2 + (line[:, None] - y) ** 2 < radius**2).float()


def scene(side=48):
    """A red disc with a thin arm on blue, its mask, and its map on 8 x 8 cells."""
    mask = disc(side, 0.4, 0.55, 0.25)[None]
    mask[:, side * 11 // 24 : side * 13 // 24, side // 2 : side * 21 // 24] = 1
    red, blue = torch.tensor([0.9, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.8])
    picture = torch.lerp(blue.view(1, 3, 1, 1), red.view(1, 3, 1, 1), mask[:, None])
    map_ = 0.05 + 0.3 * F.interpolate(mask[:, None], (8, 8), mode="area")[:, 0]
    return picture, mask, map_


def test_the_share_of_a_word_is_what_attention_makes_of_its_tokens():
    queries, keys = random(2, 3, 12, 8), random(2, 3, 7, 8, seed=1)
    word = torch.tensor([0, 0, 1, 1, 0, 0, 0], dtype=torch.bool)
    marked = word.float()[:, None].expand(2, 3, 7, 1)
    expected = F.scaled_dot_product_attention(queries, keys, marked)[..., 0].mean(1)
    torch.testing.assert_close(word_share(queries, keys, word), expected)
    assert float(word_share(queries, keys, ~word).add(expected).sub(1).abs().max()) < 1e-5


def test_half_precision_queries_do_not_overflow():
    queries, keys = (random(1, 2, 5, 16, seed=s).half() * 300 for s in (0, 1))
    found = word_share(queries, keys, torch.tensor([1, 0, 0, 0, 0], dtype=torch.bool))
    assert torch.isfinite(found).all()
    assert float(found.max()) <= 1


def test_affinity_is_self_attention_however_many_cells_there_are():
    queries, keys = random(2, 2, 1030, 4), random(2, 2, 1030, 4, seed=1)
    values = random(1030, 1, seed=2)
    expected = F.scaled_dot_product_attention(queries, keys, values.expand(2, 2, -1, -1))
    found = affinity(queries, keys)
    torch.testing.assert_close(found @ values, expected.mean((0, 1)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.ones(1030))


def test_maps_are_joined_on_the_finest_grid_by_their_weights():
    maps = {(4, 8): torch.full((4, 8), 1.0), (8, 16): torch.full((8, 16), 4.0)}
    found = joined(maps, {(4, 8): 2, (8, 16): 1})
    assert found.shape == (8, 16)
    torch.testing.assert_close(found, torch.full((8, 16), 2.0))


def test_alike_cells_come_to_look_alike():
    map_ = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    pairs = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 1, 0, 1]]).float()
    pairs = pairs / pairs.sum(1, keepdim=True)
    found = propagate(map_, {(2, 2): pairs}, {(2, 2): 1})
    assert found.tolist() == [[0.0, 0.5], [0.0, 0.5]]
    assert propagate(map_, {}, {}) is map_


def test_otsu_parts_two_groups():
    values = torch.cat([random(500) * 0.05 + 0.2, random(100, seed=1) * 0.05 + 0.8])
    assert 0.35 < otsu(values) < 0.65
    assert otsu(torch.full((9,), 0.3)) == pytest.approx(0.3)


def test_edges_of_the_picture_make_a_coarse_map_exact():
    picture, mask, map_ = scene()
    by_edges = soft_masks(map_, picture, (48, 48), 6, MaskOptions())
    alone = soft_masks(map_, picture, (48, 48), 6, MaskOptions(edges=False))
    assert float(iou(by_edges.masks, mask)) > 0.95
    assert 0.7 < float(iou(alone.masks, mask)) < 0.9
    assert bool(by_edges.found.all())
    assert float(by_edges.contrasts) > 3


@pytest.mark.parametrize("size", [(48, 48), (96, 144), (37, 50)])
def test_masks_have_the_size_of_the_picture(size):
    picture, mask, map_ = scene()
    large = F.interpolate(picture, size, mode="bilinear")
    truth = F.interpolate(mask[:, None], size, mode="bilinear")[:, 0]
    for edges in (True, False):
        found = soft_masks(map_, large, (48, 48), 6, MaskOptions(edges=edges))
        assert found.masks.shape == (1, *size)
        assert float(iou(found.masks, truth)) > (0.9 if edges else 0.7)


def test_a_higher_threshold_makes_a_smaller_mask_and_softness_soft_edges():
    picture, _, map_ = scene()
    areas = [
        float(soft_masks(map_, picture, (48, 48), 6, MaskOptions(t, 0.0, False)).masks.mean())
        for t in (0.2, 0.4, 0.6, 0.8)
    ]
    assert areas == sorted(areas, reverse=True)
    hard = soft_masks(map_, picture, (48, 48), 6, MaskOptions(0.5, 0.0, False)).masks
    soft = soft_masks(map_, picture, (48, 48), 6, MaskOptions(0.5, 0.6, False)).masks
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    between = (soft > 0.1) & (soft < 0.9)
    assert float(between.float().mean()) > 0.1
    assert torch.equal(soft > 0.5, hard > 0.5)


def test_a_map_without_a_place_in_it_makes_a_mask_of_everything_and_says_so():
    picture, mask, map_ = scene()
    maps = torch.cat([torch.full((1, 8, 8), 0.2), map_, 0.2 + 0.01 * random(1, 8, 8)])
    found = soft_masks(maps, picture.expand(3, -1, -1, -1), (48, 48), 6, MaskOptions())
    assert found.found.tolist() == [False, True, False]
    assert float(found.masks[[0, 2]].min()) == 1
    assert float(iou(found.masks[1:2], mask)) > 0.95
    assert torch.isfinite(found.contrasts).all()


def test_a_map_of_the_picture_itself_stays_what_it_is():
    picture, mask, _ = scene()
    found = follow_edges(mask[:, None], picture, 4)
    torch.testing.assert_close(found[:, 0], mask, rtol=0, atol=0.02)


def test_intersection_over_union_counts_pixels():
    first = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]]]).float()
    second = torch.tensor([[[0.6, 0.0, 0.9, 0]], [[0, 0, 0, 0]], [[0, 1, 0, 0]]])
    torch.testing.assert_close(iou(first, second), torch.tensor([1 / 3, 1.0, 0.0]))


def test_an_overlay_dims_what_is_outside_and_outlines_what_is_inside():
    pictures = torch.full((1, 20, 20, 3), 0.6)
    masks = torch.zeros(1, 20, 20)
    masks[:, 5:15, 5:15] = 1
    shown = overlay(pictures, masks)
    assert shown.shape == pictures.shape
    assert float(shown.min()) >= 0
    assert float(shown.max()) <= 1
    assert float(shown[0, 1, 1].max()) < 0.5
    inner, line = shown[0, 10, 10], shown[0, 5, 10]
    assert float(inner.mean()) > float(shown[0, 1, 1].mean())
    # The tint is red above all, on the outline most.
    assert float(line[0] - line[1]) > float(inner[0] - inner[1]) > 0.05
    whole = overlay(pictures, torch.ones(1, 20, 20))
    assert torch.equal(whole[0, 0, 0], whole[0, 10, 10])


@pytest.mark.parametrize("name", ["threshold", "softness"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_options_outside_their_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected 0 to 1"):
        MaskOptions(**{name: value})
