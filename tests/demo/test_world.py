"""The renderer and captions: the ground truth everything else is measured against."""

import re
from dataclasses import replace

import pytest
import torch

from inprocess import load_pack

load_pack()

from comfyui_perfusion.demo import captions, render, specs, things, world  # noqa: E402
from comfyui_perfusion.demo.classes import CLASS_NAMES, KINDS  # noqa: E402
from comfyui_perfusion.demo.model.small_autoencoder import COLORS  # noqa: E402
from comfyui_perfusion.demo.palette import PALETTE  # noqa: E402
from comfyui_perfusion.demo.sprites import PATTERNS  # noqa: E402


def test_the_same_seed_draws_the_same_pictures() -> None:
    first, first_masks = render.render(specs.sample_specs(6, seed=5))
    second, second_masks = render.render(specs.sample_specs(6, seed=5))
    other, _ = render.render(specs.sample_specs(6, seed=6))
    assert torch.equal(first, second)
    assert torch.equal(first_masks, second_masks)
    assert not torch.equal(first, other)


def test_the_mask_is_where_the_thing_is() -> None:
    drawn = things.personal_specs("Bo the teddy", 4, seed=3)
    pictures, masks = render.render(drawn)
    other = specs.Specs(**{**vars(drawn), "color": drawn.color + 1, "second": drawn.second - 1})
    recolored, _ = render.render(other)
    changed = (pictures != recolored).any(1)
    assert bool(changed.any())
    assert float(masks[:, 0][changed].min()) == 1


def test_renderings_are_made_of_the_palette_alone() -> None:
    pictures, _ = render.render(specs.sample_specs(40, seed=9))
    known = {tuple(color) for color in (PALETTE * 255).round().int().tolist()}
    shown = {tuple(color) for color in pictures.permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    assert shown <= known
    assert len(known) == len(PALETTE) == COLORS


def test_a_personal_thing_looks_the_same_in_every_picture_and_unlike_others() -> None:
    a = things.personal_specs("Pim the cat", 5, seed=0)
    for name in specs.LOOK:
        values = getattr(a, name)[:, 0]
        assert torch.equal(values, values[:1].expand_as(values)), name
    looks = {tuple(vars(look).values()) for look in things.THINGS.values()}
    assert len(looks) == len(things.SUBJECTS)


def test_no_caption_could_name_the_main_colour_of_a_personal_thing() -> None:
    for subject, look in things.THINGS.items():
        assert look.color not in specs.COLOR_NAMES, subject


@pytest.mark.parametrize("subject", things.SUBJECTS)
def test_personal_pictures_come_as_images_and_masks(subject: str) -> None:
    images, masks = world.personal_pictures(subject, 3, seed=1)
    assert images.shape == (3, 64, 64, 3)
    assert masks.shape == (3, 64, 64)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    assert float(masks.max()) == 1
    assert things.superclass_of(subject) in subject


def test_unknown_subjects_and_counts_are_refused_with_the_choices_named() -> None:
    with pytest.raises(ValueError, match="Pim the cat"):
        world.personal_pictures("Nobody", 3, seed=1)
    with pytest.raises(ValueError, match="at least 1"):
        world.personal_pictures("Pim the cat", 0, seed=1)


def test_captions_are_reproducible_and_use_only_the_vocabulary() -> None:
    texts = captions.sample_captions(400, seed=2)
    assert texts == captions.sample_captions(400, seed=2)
    known = set(captions.vocabulary())
    for text in texts:
        assert set(re.sub(",", " , ", text).split()) <= known, text


def test_captions_name_what_the_picture_shows() -> None:
    shown = specs.sample_specs(300, seed=4)
    for index, text in enumerate(captions.captions(shown, seed=4)):
        words = KINDS[CLASS_NAMES[int(shown.kind[index, 0])]].words
        assert any(word in re.findall(r"[a-z-]+", text) for word in words), text
        sketch = "sketch" in text or "drawing" in text
        assert sketch == (int(shown.style[index]) == specs.STYLES.index("sketch")), text


def test_a_caption_tells_all_that_is_unusual_in_an_ordinary_thing() -> None:
    shown = specs.sample_specs(300, seed=11, two_share=0.0)
    assert bool(specs.ordinary(shown).all())
    for index, text in enumerate(captions.captions(shown, seed=11)):
        words = set(re.findall(r"[a-z-]+", text))
        kind = KINDS[CLASS_NAMES[int(shown.kind[index, 0])]]
        color = specs.COLOR_NAMES[int(shown.color[index, 0])]
        assert color in words or color == kind.usual_colors[0], text
        striped = int(shown.pattern[index, 0]) == PATTERNS.index("striped")
        assert striped == bool(words & {"striped", "stripy"}), text


def test_odd_things_are_not_ordinary_and_need_a_name() -> None:
    shown = specs.sample_specs(300, seed=12, two_share=0.0, odd_share=1.0)
    share = float(specs.ordinary(shown)[:, 0].float().mean())
    assert share < 0.02
    for subject in things.SUBJECTS:
        assert not bool(specs.ordinary(things.personal_specs(subject, 1, seed=0))[0, 0]), subject


def test_things_face_the_middle_and_a_mirrored_picture_is_one_of_this_world() -> None:
    shown = specs.sample_specs(300, seed=13, odd_share=0.5)
    shown = shown.take(shown.scene != specs.SCENES.index("plain"))
    other = replace(shown, x=-shown.x, variant=shown.variant ^ 1)
    assert bool((shown.flip != other.flip).all())
    assert bool(shown.flip[shown.x > 0].all())
    assert not bool(shown.flip[shown.x < 0].any())
    (there, masks), (back, mirrored) = render.render(shown), render.render(other)
    assert torch.equal(masks, mirrored.flip(-1))
    assert torch.equal(there, back.flip(-1))


@pytest.mark.parametrize("kind", CLASS_NAMES)
def test_a_things_halves_are_the_same_whichever_way_it_looks(kind: str) -> None:
    shown = things.put_thing(
        things.photo_specs(1, seed=1), things.Look(kind, "teal", "cream", "lime", pattern="halves")
    )
    shown.x[:], shown.scene[:], shown.variant[:] = 0, 0, 0
    back = replace(shown, variant=shown.variant + 1)
    assert bool(shown.flip[0, 0])
    assert not bool(back.flip[0, 0])
    (first, here), (second, mirrored) = render.render(shown), render.render(back)
    own, other = here[:, :1].bool(), mirrored[:, :1].flip(-1).bool()
    assert torch.equal(own, other)
    assert torch.equal(first * own, second.flip(-1) * own)
    colors = {tuple(c) for c in first.permute(0, 2, 3, 1)[own[:, 0]].tolist()}
    for name in ("teal", "cream"):
        at = 2 * specs.ALL_COLORS.index(name)
        either = {tuple(c) for c in (PALETTE[at : at + 2] * 255).round().int().tolist()}
        assert colors & either, name
