"""Masks from a real MODEL's attention, and that nothing of it is changed by looking."""

from __future__ import annotations

import logging

import comfy.model_management
import pytest
import torch
from comfyui_perfusion.demo.model.small_model import load_small_model
from comfyui_perfusion.demo.world import world_weights
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import UnsupportedModelError, cross_attentions
from comfyui_perfusion.host.pictures import auto_mask as module
from comfyui_perfusion.host.pictures.attention_watch import AttentionWatch
from comfyui_perfusion.host.pictures.auto_mask import AutoMaskOptions, auto_mask
from comfyui_perfusion.nodes.masks import PerfusionAutoMask
from comfyui_perfusion.perfusion.masks.attention import word_share
from comfyui_perfusion.perfusion.masks.soft_masks import MaskOptions

from tests.host.cross_models import build_cross, narrow_families

FAMILIES = ("sd1_light", "sd2_light", "sdxl_light", "sdxl_refiner")
# One draw at a small size, hard edges where the model sees them: what differs is the model's.
QUICK = AutoMaskOptions(MaskOptions(edges=False), draws=1, resolution=64)


def pictures(count=2, height=48, width=64, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, height, width, channels, generator=generator)


@pytest.fixture(scope="module")
def world(worlds):
    """A small SD1.x model with its text encoder and VAE."""
    return worlds.new_model("small"), worlds.clip("sd1"), worlds.vae()


@pytest.fixture(autouse=True)
def _any_contrast_counts(monkeypatch):
    """Models with random weights look everywhere about equally."""
    monkeypatch.setattr("comfyui_perfusion.perfusion.masks.soft_masks._FLAT", 1.0)


def masks_of(world, images=None, word="cat", options=QUICK):
    return auto_mask(*world, pictures() if images is None else images, word, options).masks


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_a_mask_for_each_picture_and_stays_as_it_was(worlds, family):
    model, clip = worlds.model(family), worlds.clip(family)
    before, options = worlds.state(model), str(model.model_options)
    with torch.inference_mode():
        found = auto_mask(model, clip, worlds.vae(), pictures(), "coffee mug", QUICK)
    assert found.masks.shape == (2, 48, 64)
    assert found.overlay.shape == (2, 48, 64, 3)
    for mask in found.masks:
        assert float(mask.max()) == 1
        assert float(mask.min()) == 0
    assert worlds.same(worlds.state(model), before)
    assert str(model.model_options) == options
    assert model.model.current_patcher is None


def test_what_is_watched_is_the_attention_to_the_word_and_nothing_else(world, monkeypatch):
    """Also where a picture has as many cells as the prompt has tokens: 7 x 11 of them."""
    queries, keys, seen = [], [], []
    model = world[0].model
    handles = []
    for layer in cross_attentions(model):
        attention = model.diffusion_model.get_submodule(layer.name)
        handles += [
            attention.to_q.register_forward_hook(lambda _, x, y: queries.append(y)),
            attention.to_k.register_forward_hook(lambda _, x, y: keys.append(y)),
        ]

    class Kept(AttentionWatch):
        def __init__(self, word, *rest):
            super().__init__(word, *rest)
            seen.append((word, self))

    monkeypatch.setattr(module, "AttentionWatch", Kept)
    try:
        masks_of(world, pictures(1, 56, 88), "birdbath", AutoMaskOptions(draws=1, resolution=70))
    finally:
        for handle in handles:
            handle.remove()
    ((word, watch),) = seen
    # "a photo of a birdbath": the start token, four words, bird and bath.
    assert word.nonzero().flatten().tolist() == [5, 6]
    by_head = [[x.unflatten(-1, (8, -1)).transpose(1, 2) for x in side] for side in (queries, keys)]
    shares = [word_share(q, k, word).sum(0) for q, k in zip(*by_head, strict=True)]
    assert list(watch._looks) == [(7, 11)]
    torch.testing.assert_close(watch._looks[7, 11].flatten(), torch.stack(shares).sum(0))
    assert watch._counts == {(7, 11): 2 * len(shares)}
    (alike,) = watch._alike.values()
    assert alike.shape == (77, 77)


def test_the_executors_mode_makes_no_difference(world):
    plain = masks_of(world)
    with torch.inference_mode():
        assert torch.equal(masks_of(world), plain)


def test_the_same_seed_gives_the_same_masks_and_more_draws_calm_the_seed_down(world):
    def options(seed, draws=1):
        return AutoMaskOptions(QUICK.masks, draws, QUICK.resolution, seed)

    first, again, other = (
        masks_of(world, pictures(1), options=options(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    many = [masks_of(world, pictures(1), options=options(seed, 12)) for seed in (1, 2)]
    assert float((many[0] - many[1]).abs().mean()) < float((first - other).abs().mean())


def test_a_picture_gets_its_mask_whatever_follows_it(world):
    images = pictures(3)
    assert torch.equal(masks_of(world, images)[:1], masks_of(world, images[:1]))


@pytest.mark.parametrize("size", [(37, 50), (200, 40), (33, 33)])
def test_pictures_of_any_size_and_with_transparency_are_masked_whole(world, size):
    found = auto_mask(*world, pictures(1, *size, channels=4), "cat", QUICK)
    assert found.masks.shape == (1, *size)
    assert found.overlay.shape == (1, *size, 3)


def test_what_other_nodes_put_into_sampling_neither_runs_nor_is_lost(worlds, world):
    def never(*_, **__):
        raise AssertionError("ran")

    plain = masks_of(world)
    model = world[0].clone()
    for layer in range(12):
        model.set_model_attn2_replace(never, "input", layer)
        model.set_model_attn2_replace(never, "output", layer)
    model.set_model_attn1_patch(never)
    model.model_options["transformer_options"]["optimized_attention_override"] = never
    model.set_model_unet_function_wrapper(never)
    options = str(model.model_options)
    assert torch.equal(masks_of((model, *world[1:])), plain)
    assert str(model.model_options) == options


def test_applied_concepts_do_not_count_and_act_afterwards_as_before(worlds):
    model, clip, vae = worlds.model("sd1_light"), worlds.clip("sd1"), worlds.vae()
    plain = masks_of((model, clip, vae))
    concept = worlds.concept("sd1_light", placeholder="<thing>")
    edited, words = apply_concepts(model, clip, [concept])
    before = worlds.sample(edited, words, "a <thing>")
    assert torch.equal(masks_of((edited, words, vae)), plain)
    assert torch.equal(worlds.sample(edited, words, "a <thing>"), before)
    assert torch.equal(masks_of((edited, clip, vae)), plain)


def test_a_lora_counts(worlds, world):
    patched = worlds.with_lora(world[0], worlds.lora(world[0], 3))
    assert not torch.equal(masks_of((patched, *world[1:])), masks_of(world))


def test_a_word_that_is_seen_everywhere_masks_everything_with_a_warning(
    worlds, world, caplog, monkeypatch
):
    monkeypatch.setattr("comfyui_perfusion.perfusion.masks.soft_masks._FLAT", 1.2)
    blind = worlds.new_model("small")
    with torch.no_grad():
        for layer in cross_attentions(blind.model):
            layer.to_k.weight.zero_()
    with caplog.at_level(logging.WARNING, "perfusion"):
        found = auto_mask(blind, *world[1:], pictures(), "cat", QUICK)
    assert float(found.masks.min()) == 1
    assert found.report.splitlines() == [
        f"image {at}: 'cat' is looked at about equally everywhere, so all of the picture is in its "
        "mask; use another word for the thing, or paint the mask"
        for at in (0, 1)
    ]
    assert found.report in caplog.text


def test_an_interrupt_leaves_the_model_as_it_was(worlds, world, monkeypatch):
    before, seen = worlds.state(world[0]), []

    def stop_at_three(self, value, total=None, preview=None):
        seen.append((value, self.total))
        if value == 3:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr("comfy.utils.ProgressBar.update_absolute", stop_at_three)
    monkeypatch.setattr(module, "_ROWS", 1)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        masks_of(world)
    assert seen == [(1, 4), (2, 4), (3, 4)]
    assert world[0].model.current_patcher is None
    assert worlds.same(worlds.state(world[0]), before)


@pytest.mark.parametrize("word", ["", "  "])
def test_no_word_is_refused_with_an_example(world, word):
    with pytest.raises(ValueError, match=r"everyday word.*coffee mug, found nothing"):
        masks_of(world, word=word)


def test_a_placeholder_is_no_word_the_model_knows(worlds, world):
    concept = worlds.concept("sd1_light", placeholder="<thing>")
    _, words = apply_concepts(worlds.model("sd1_light"), worlds.clip("sd1"), [concept])
    with pytest.raises(ValueError, match=r"'<thing>' is missing from the prompt.*plain word"):
        masks_of((world[0], words, world[2]), word="<thing>")


@pytest.mark.parametrize("word", ["embedding:x", "(cat:1.2)", "cat\u200b"])
def test_prompt_syntax_is_refused(world, word):
    with pytest.raises(ValueError, match="superclass: expected visible characters"):
        masks_of(world, word=word)


def test_a_phrase_longer_than_a_prompt_is_refused(world):
    with pytest.raises(ValueError, match="superclass: expected 1 to 128 characters"):
        masks_of(world, word="very " * 40 + "long")


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((0, 32, 32, 3), "at least one"),
        ((2, 32, 32), r"found \(2, 32, 32\)"),
        ((1, 3, 32, 32), r"found \(1, 3, 32, 32\)"),
        ((1, 0, 32, 3), r"found \(1, 0, 32, 3\)"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_shape(world, shape, said):
    with pytest.raises(ValueError, match=said):
        masks_of(world, torch.rand(shape))


def test_pictures_with_nan_are_refused_by_number(world):
    images = pictures()
    images[1, 3, 3, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in image 1"):
        masks_of(world, images)


def test_models_and_parts_that_do_not_fit_are_refused(worlds, world):
    joint = worlds.new_model("small")
    joint.model.diffusion_model = torch.nn.Linear(1, 1)
    with pytest.raises(
        UnsupportedModelError, match=r"its network is a Linear.*supported are.*SDXL"
    ):
        masks_of((joint, *world[1:]))
    with pytest.raises(UnsupportedModelError, match="expected the text encoders clip_l"):
        masks_of((world[0], worlds.clip("sd2"), world[2]))
    with pytest.raises(ValueError, match=r"VAE of 4 latent channels.*found 24"):
        masks_of((*world[:2], load_small_model(world_weights())[2]))


def test_a_transformer_is_refused_by_name(world):
    with narrow_families():
        model = build_cross("cosmos_predict2")
        with pytest.raises(UnsupportedModelError, match=r"UNets, Cosmos-Predict2 is another kind"):
            masks_of((model, *world[1:]))


@pytest.mark.parametrize(("name", "value"), [("draws", 0), ("resolution", -1)])
def test_options_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        AutoMaskOptions(**{name: value})


def test_the_node_gives_masks_and_pictures_and_shows_them(world):
    images = pictures()
    with torch.inference_mode():
        output = PerfusionAutoMask.execute(*world, images, " cat ", draws=1, resolution=64)
    masks, overlay, report = output.args
    expected = auto_mask(*world, images, "cat", AutoMaskOptions(draws=1, resolution=64))
    assert torch.equal(masks, expected.masks)
    assert torch.equal(overlay, expected.overlay)
    assert len(report.splitlines()) == len(output.ui["images"]) == len(images)
    assert output.ui["text"] == (report,)
