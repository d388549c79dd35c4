"""Pictures and masks as they come from nodes, as latents and weights on their grid."""

from __future__ import annotations

import logging

import pytest
import torch
from comfyui_perfusion.host.pictures.image_rows import check_images
from comfyui_perfusion.host.pictures.training_images import ImageOptions, encode_images


@pytest.fixture(scope="module")
def vae(worlds):
    """Four channels on an eighth of the side."""
    return worlds.vae()


def pictures(count, height=32, width=32, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, height, width, channels, generator=generator)


def transparent(count, opaque=0.0):
    """Pictures of 32x32 with something in the upper left quarter and `opaque` elsewhere."""
    images = pictures(count, channels=4)
    images[..., 3] = opaque
    images[:, :16, :16, 3] = 1
    return images


def assert_encoded(vae, found, images):
    """The latents are those of the images, up to what a batch changes of their rounding."""
    torch.testing.assert_close(found, vae.encode(images).detach(), rtol=1e-4, atol=1e-5)


def test_as_they_are_pictures_are_what_the_vae_makes_of_them(vae):
    images = pictures(3)
    found = encode_images(vae, [images])
    assert_encoded(vae, torch.cat(found.latents), images)
    assert found.masks is None
    assert found.sizes == [(32, 32)] * 3


def test_pictures_of_different_sizes_keep_their_own(vae):
    found = encode_images(vae, [pictures(2), pictures(1, 40, 64), pictures(1, 48, 24)])
    assert [tuple(latents.shape) for latents in found.latents] == [
        (1, 4, 4, 4),
        (1, 4, 4, 4),
        (1, 4, 5, 8),
        (1, 4, 6, 3),
    ]
    assert found.sizes == [(32, 32), (32, 32), (64, 40), (24, 48)]


def test_edges_are_cut_where_the_vae_would_cut_them_and_said_so(vae, caplog):
    images = pictures(2, 34, 37)
    with caplog.at_level(logging.INFO, "perfusion"):
        found = encode_images(vae, [images])
    assert_encoded(vae, torch.cat(found.latents), images)
    assert "2 pictures of 37x34: cropped to the middle 32x32 (18.6% cut off)" in caplog.text


def test_a_resolution_brings_pictures_to_sizes_of_its_area_and_says_so(vae, caplog):
    with caplog.at_level(logging.INFO, "perfusion"):
        found = encode_images(
            vae, [pictures(1, 300, 300), pictures(1, 150, 310)], options=ImageOptions(128)
        )
    assert found.sizes == [(128, 128), (128, 64)]
    assert found.latents[1].shape == (1, 4, 8, 16)
    assert "1 picture of 300x300: resized to 128x128" in caplog.text
    assert "1 picture of 310x150: cropped to the middle 300x150" in caplog.text


def test_enlarging_is_a_warning(vae, caplog):
    with caplog.at_level(logging.WARNING, "perfusion"):
        encode_images(vae, [pictures(1)], options=ImageOptions(64))
    assert "1 picture of 32x32: resized to 64x64, which is 2.0 times enlarged" in caplog.text


def test_a_resolution_that_fits_changes_nothing(vae):
    images = pictures(1, 64, 64)
    plain, resized = (encode_images(vae, [images], None, ImageOptions(r)) for r in (0, 64))
    assert torch.equal(plain.latents[0], resized.latents[0])


def test_masks_are_cropped_like_the_pictures_and_brought_to_the_latent_grid(vae):
    masks = torch.zeros(2, 34, 36)
    masks[0, 1:9, 2:10] = 1  # the first latent pixel once the edges are cropped
    masks[1, 1:5, 2:10] = 0.5  # half of it, at half weight
    found = encode_images(vae, [pictures(2, 34, 36)], [masks]).masks
    expected = torch.zeros(1, 1, 4, 4)
    expected[0, 0, 0, 0] = 1
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected / 4)


def test_masks_belong_to_pictures_one_by_one_whatever_batches_they_come_in(vae):
    images = [pictures(2), pictures(1, 40, 64)]
    first, second, third = torch.rand(32, 32), torch.rand(32, 32), torch.rand(40, 64)
    found = encode_images(vae, images, [torch.stack([first, second]), third])
    again = encode_images(vae, images, [first[None], second, third[None]])
    assert all(torch.equal(a, b) for a, b in zip(found.masks, again.masks, strict=True))
    assert [mask.shape[-2:] for mask in found.masks] == [(4, 4), (4, 4), (5, 8)]


def test_one_mask_serves_all_pictures(vae):
    mask = torch.zeros(32, 32)
    mask[:8] = 1
    found = encode_images(vae, [pictures(3)], [mask]).masks
    assert len(found) == 3
    assert all(torch.equal(other, found[0]) for other in found)


def test_transparency_is_a_mask(vae, caplog):
    images = transparent(2, opaque=0.25)
    with caplog.at_level(logging.INFO, "perfusion"):
        found = encode_images(vae, [images])
    expected = torch.full((1, 1, 4, 4), 0.25)
    expected[..., :2, :2] = 1
    assert all(torch.equal(mask, expected) for mask in found.masks)
    assert_encoded(vae, torch.cat(found.latents), images[..., :3])
    assert "transparency of the pictures is their mask" in caplog.text


def test_a_picture_without_transparency_beside_one_with_it_counts_everywhere(vae):
    found = encode_images(vae, [transparent(1), pictures(1)]).masks
    assert found[0].min() == 0
    assert found[1].min() == 1


def test_transparency_is_no_mask_when_all_is_opaque_or_masks_are_given_or_it_is_not_wanted(vae):
    assert encode_images(vae, [transparent(1, opaque=1.0)]).masks is None
    assert encode_images(vae, [transparent(1)], options=ImageOptions(alpha=False)).masks is None
    given = encode_images(vae, [transparent(1)], [torch.ones(32, 32)])
    assert float(given.masks[0].min()) == 1


def test_flip_adds_the_mirror_image_and_the_mirrored_mask(vae):
    images, mask = pictures(1), torch.rand(32, 32)
    found = encode_images(vae, [images], [mask], ImageOptions(flip=True))
    assert_encoded(vae, found.latents[0], torch.cat([images, images.flip(2)]))
    torch.testing.assert_close(found.masks[0][1], found.masks[0][0].flip(-1))


def test_versions_start_with_the_picture_and_flip_doubles_them(vae):
    options = ImageOptions(flip=True, crop=0.4, variants=3, seed=5)
    images = pictures(2)
    found = encode_images(vae, [images], None, options)
    assert [latents.shape[0] for latents in found.latents] == [6, 6]
    assert_encoded(vae, found.latents[0][:1], images[:1])
    assert_encoded(vae, found.latents[1][3:4], images[1:].flip(2))
    assert found.masks is None
    flat = torch.cat(found.latents).flatten(1)
    assert len(torch.unique(flat, dim=0)) == 12


def test_the_seed_decides_the_versions(vae):
    first, again, other = (
        encode_images(vae, [pictures(1)], None, ImageOptions(crop=0.4, variants=3, seed=seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.latents[0], again.latents[0])
    assert not torch.equal(first.latents[0], other.latents[0])


def test_the_background_of_wider_versions_has_no_weight(vae):
    options = ImageOptions(zoom_out=0.5, variants=4)
    found = encode_images(vae, [pictures(2, 64, 64)], None, options)
    for mask in found.masks:
        assert torch.equal(mask[0], torch.ones(1, 8, 8))
        assert float(mask[1:].min()) == 0
        assert all(float(wider.max()) > 0 for wider in mask)
        assert float(mask[1:].mean()) < 0.9


def test_the_mask_stays_on_its_thing_in_every_version(vae, monkeypatch):
    """The red of the picture is its mask, so what the mask covers can be told."""
    mask = torch.zeros(64, 64)
    mask[10:30, 40:60] = 1
    images = mask[None, ..., None].repeat(1, 1, 1, 3)
    rendered = []

    encode = vae.encode

    def watched(pixels):
        rendered.append(pixels)
        return encode(pixels)

    monkeypatch.setattr(vae, "encode", watched)
    options = ImageOptions(flip=True, crop=0.5, zoom_out=0.3, variants=6)
    found = encode_images(vae, [images], [mask], options).masks[0]
    red = torch.nn.functional.interpolate(rendered[0][..., :1].movedim(-1, 1), (8, 8), mode="area")
    assert found.shape == (12, 1, 8, 8)
    # The mirrored surroundings may repeat the thing without its mask.
    inside = found > 0.5
    assert float((red - found)[inside].abs().max()) < 0.1
    assert all(float(version.max()) > 0.5 for version in found)


def test_without_crop_and_zoom_out_more_variants_are_not_made_and_this_is_said(vae, caplog):
    with caplog.at_level(logging.INFO, "perfusion"):
        found = encode_images(vae, [pictures(1)], None, ImageOptions(variants=4))
    assert found.latents[0].shape[0] == 1
    assert "all versions of a picture are one" in caplog.text


def test_the_digest_names_pixels_masks_and_options(vae):
    images, mask = pictures(2), torch.ones(32, 32)
    other = images.clone()
    other[1, 3, 4, 0] += 0.01
    digests = [
        encode_images(vae, *given).digest
        for given in (
            ([images],),
            ([other],),
            ([images], [mask]),
            ([images], [mask / 2]),
            ([images], None, ImageOptions(flip=True)),
            ([images], None, ImageOptions(crop=0.2, variants=2)),
            ([images], None, ImageOptions(crop=0.2, variants=2, seed=1)),
        )
    ]
    assert len(set(digests)) == len(digests)
    assert encode_images(vae, [images[:1], images[1:]]).digest == digests[0]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one training image, found none"),
        ([torch.rand(0, 32, 32, 3)], "at least one training image, found none"),
        ([torch.rand(1, 0, 32, 3)], r"images with pixels, found \(1, 0, 32, 3\)"),
        ([torch.rand(2, 8, 8, 3), torch.full((1, 8, 8, 3), torch.nan)], "infinity in image 2"),
        ([torch.rand(32, 32, 3)], r"images \(B, H, W, 3 or 4\), found \(32, 32, 3\)"),
        ([torch.rand(1, 32, 32, 1)], r"found \(1, 32, 32, 1\)"),
    ],
)
def test_pictures_that_are_none_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        check_images(images)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([torch.ones(2, 32, 32)], "a mask for each of the 3 images, or one for all, found 2"),
        ([torch.ones(3, 16, 24)], "a mask of 32x32 for image 0, found 24x16"),
        ([torch.ones(1, 1, 32, 32)], r"masks \(B, H, W\), found \(1, 1, 32, 32\)"),
        ([torch.ones(2, 32, 32), torch.zeros(32, 32)], "mask of image 2 is empty"),
        (
            [torch.ones(2, 32, 32), torch.full((32, 32), torch.nan)],
            "NaN or infinity in that of.* 2",
        ),
        ([torch.full((32, 32), 255.0)], r"weights in 0..1, found 255 to 255 in that of image 0"),
        ([-torch.ones(32, 32)], r"weights in 0..1, found -1 to -1 in that of image 0"),
    ],
)
def test_masks_that_cannot_be_used_are_refused_by_number(vae, masks, message):
    with pytest.raises(ValueError, match=message):
        encode_images(vae, [pictures(3)], masks)


def test_a_fully_transparent_picture_is_an_empty_mask(vae):
    images = transparent(2)
    images[1, ..., 3] = 0
    with pytest.raises(ValueError, match="mask of image 1 is empty"):
        encode_images(vae, [images])


def test_a_mask_only_where_the_picture_is_cut_off_is_refused(vae):
    mask = torch.zeros(32, 39)
    mask[:, :2] = 1
    with pytest.raises(ValueError, match=r"mask of image 0 is empty within the part .* 32x32"):
        encode_images(vae, [pictures(1, 32, 39)], [mask])


def test_a_picture_smaller_than_a_latent_is_refused(vae):
    with pytest.raises(ValueError, match=r"at least 8x8.* found 32x7"):
        encode_images(vae, [pictures(1, 7, 32)])


def test_a_vae_that_makes_nan_is_reported_with_the_image(worlds):
    broken = worlds.vae()
    with torch.no_grad():
        next(broken.first_stage_model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"NaN or infinity of image 0; .*--fp32-vae"):
        encode_images(broken, [pictures(1)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": -1}, "resolution: expected 0 or a number of pixels, found -1"),
        ({"crop": 1.0, "variants": 2}, "crop: expected 0 to below 1, found 1.0"),
        ({"zoom_out": -0.1, "variants": 2}, "zoom_out: expected 0 to below 1"),
        ({"variants": 0}, "variants: expected at least 1, found 0"),
        ({"crop": 0.2}, "at least 2 with crop 0.2 .* set variants to 4"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ImageOptions(**changes)


def test_load_images_stand_in_for_no_mask_is_none(vae):
    images = [torch.rand(1, 80, 64, 3), torch.rand(1, 64, 64, 3)]
    stand_in = torch.zeros(1, 64, 64)
    assert encode_images(vae, images, [stand_in, stand_in]).masks is None
    assert encode_images(vae, images, [stand_in]).masks is None
    real = torch.zeros(1, 64, 64)
    real[:, :32] = 1
    found = encode_images(vae, images, [stand_in, real]).masks
    assert found is not None
    assert bool((found[0] == 1).all())
    assert float(found[1].mean()) == 0.5


def test_transparency_is_taken_where_load_image_gives_no_mask(vae):
    images = torch.rand(1, 64, 64, 4)
    images[..., 3] = 0
    images[:, :32, :, 3] = 1
    found = encode_images(vae, [images], [torch.zeros(1, 64, 64)]).masks
    assert found is not None
    assert float(found[0].mean()) == 0.5


def test_a_mask_that_is_white_around_the_thing_is_doubted_and_the_right_way_round_is_not(
    vae, caplog
):
    thing = torch.zeros(1, 64, 64)
    thing[:, 16:48, 16:48] = 1
    encode_images(vae, [torch.rand(1, 64, 64, 3)], [thing])
    encode_images(vae, [torch.rand(1, 64, 64, 3)], [torch.ones(1, 64, 64)])
    assert "Invert Mask" not in caplog.text
    encode_images(vae, [torch.rand(1, 64, 64, 3)], [1 - thing])
    assert "the mask of image 0 covers its edges" in caplog.text
    assert "Invert Mask" in caplog.text
    caplog.clear()
    # A thing that stands on the lower edge, and one that fills most of the picture.
    standing = torch.zeros(1, 64, 64)
    standing[:, 16:, 20:44] = 1
    filling = torch.zeros(1, 64, 64)
    filling[:, 4:, 2:] = 1
    encode_images(vae, [torch.rand(2, 64, 64, 3)], [torch.cat([standing, filling])])
    assert "Invert Mask" not in caplog.text
    encode_images(vae, [torch.rand(2, 64, 64, 3)], [torch.cat([filling, 1 - standing])])
    assert "the mask of image 1 covers its edges" in caplog.text


def test_pictures_beyond_the_models_own_size_are_brought_to_it_and_others_stay(vae):
    sizes = [(160, 480), (128, 128), (40, 48)]
    images = [torch.rand(1, height, width, 3) for height, width in sizes]
    found = encode_images(vae, images, own_side=128)
    across, down = found.sizes[0]
    assert (across, down) == (192, 64)
    assert found.sizes[1:] == [(128, 128), (48, 40)]
    assert encode_images(vae, images).sizes[0] == (480, 160)


def test_a_picture_far_below_the_models_size_is_named_with_what_helps(vae, caplog):
    images = [torch.rand(1, 40, 48, 3), torch.rand(1, 70, 70, 3)]
    found = encode_images(vae, images, own_side=128)
    assert "pictures of 48x40 are far below the 128x128" in caplog.text
    assert "resolution 128 in Training Options" in caplog.text
    assert "70x70" not in caplog.text
    assert found.lines[0] == "1 picture of 48x40: as they are"
    caplog.clear()
    encode_images(vae, images, options=ImageOptions(resolution=128), own_side=128)
    assert "far below" not in caplog.text
    assert "3.2 times enlarged" in caplog.text


def test_encoding_can_be_stopped_between_pictures(vae):
    seen = []

    def stop(at, count):
        seen.append((at, count))
        if at == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_images(vae, [torch.rand(3, 16, 16, 3)], before_each=stop)
    assert seen == [(0, 3), (1, 3)]
