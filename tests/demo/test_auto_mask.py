"""Masks from the small world's own attention, held against its renderer's."""

import pytest
import torch

from benchmarks.auto_mask import PERSONAL, PHOTOS, picture_sets
from inprocess import load_pack

load_pack()

from comfyui_perfusion.demo.model.small_model import load_small_model  # noqa: E402
from comfyui_perfusion.demo.things import SUBJECTS  # noqa: E402
from comfyui_perfusion.demo.world import personal_pictures, world_weights  # noqa: E402
from comfyui_perfusion.host.pictures.auto_mask import AutoMaskOptions, auto_mask  # noqa: E402
from comfyui_perfusion.nodes.masks import PerfusionAutoMask  # noqa: E402
from comfyui_perfusion.perfusion.masks.soft_masks import MaskOptions, iou  # noqa: E402


@pytest.fixture(scope="module")
def world() -> tuple:
    return load_small_model(world_weights())


def overlaps(
    world: tuple, name: str, count: int, options: AutoMaskOptions | None = None
) -> dict[str, float]:
    return {
        kind: float(iou(auto_mask(*world, images, word, options).masks, truth).mean())
        for (_, kind), ((images, truth), word) in picture_sets(count, [name]).items()
    }


def test_things_the_model_never_saw_are_found(world: tuple) -> None:
    found = overlaps(world, PERSONAL, 3)
    assert len(found) == len(SUBJECTS)
    assert sum(found.values()) / len(found) > 0.8
    assert min(found.values()) > 0.7, found


def test_things_of_all_kinds_are_found(world: tuple) -> None:
    found = overlaps(world, PHOTOS, 3)
    assert len(found) == 8
    assert sum(found.values()) / len(found) > 0.8
    assert min(found.values()) > 0.7, found


def test_edges_make_masks_better_and_self_attention_none_worse(world: tuple) -> None:
    def mean(alike: bool, edges: bool) -> float:
        options = AutoMaskOptions(MaskOptions(edges=edges), draws=1, self_attention=alike)
        found = overlaps(world, PERSONAL, 2, options)
        return sum(found.values()) / len(found)

    alone = mean(False, False)
    assert alone > 0.6
    edged = mean(False, True)
    assert edged > alone + 0.05
    # Cross-attention that was taught where things are leaves self-attention nothing to add.
    assert mean(True, True) > edged - 0.02


def test_a_list_of_pictures_of_different_sizes_is_masked_one_by_one(world: tuple) -> None:
    """As ComfyUI maps a list of images over the node."""
    images, truth = personal_pictures(SUBJECTS[2], 2, 0)
    large = torch.nn.functional.interpolate(images.movedim(-1, 1), (96, 128), mode="bilinear")
    for picture, shape in ((images[:1], (64, 64)), (large[1:].movedim(1, -1), (96, 128))):
        mask, overlay, _ = PerfusionAutoMask.execute(*world, picture, "teddy").args
        assert mask.shape == (1, *shape)
        assert overlay.shape == (1, *shape, 3)
        wanted = torch.nn.functional.interpolate(truth[:, None], shape, mode="bilinear")[:, 0]
        row = 0 if shape == (64, 64) else 1
        # Enlarged and stretched the model knows things less well; all of the picture has 0.3.
        assert float(iou(mask, wanted[row : row + 1])) > (0.85, 0.6)[row]


def test_a_lower_threshold_takes_more_of_the_picture(world: tuple) -> None:
    images, _ = personal_pictures(SUBJECTS[0], 2, 0)
    areas = [
        float(auto_mask(*world, images, "cat", AutoMaskOptions(MaskOptions(t))).masks.mean())
        for t in (0.2, 0.4, 0.6)
    ]
    assert areas[0] > areas[1] > areas[2] > 0.02
