"""Photos as cameras, phones and scanners write them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfyui_perfusion.host.pictures.photo_files import (
    fingerprint,
    photo_files,
    photo_folder,
    read_photo,
    read_photos,
)
from PIL import Image

UPRIGHT, RIGHT_TOP = 1, 6
# What JPEG may change in even areas: one step of 256 in each of its roundings.
JPEG = 3 / 255


def two_halves(width=32, height=16):
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", (width, height), (250, 10, 10))
    picture.paste((10, 10, 250), (width // 2, 0, width, height))
    return picture


def saved(picture, file, orientation=UPRIGHT, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(file, exif=exif, **options)
    return file


def corner(photo, row, column):
    """The colour a quarter of the side away from an edge, in 0..255."""
    height, width = photo.pixels.shape[1:3]
    pixel = photo.pixels[0, height // 4 * (3 if row else 1), width // 4 * (3 if column else 1)]
    return (pixel * 255).round().tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_the_way_it_was_taken(tmp_path, orientation):
    # The tag says what a program must do; here each one's opposite was done before.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = two_halves()
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    photo = read_photo(saved(stored, tmp_path / "a.png", orientation))
    assert photo.pixels.shape == (1, 16, 32, 3)
    assert corner(photo, 0, 0) == [250, 10, 10]
    assert corner(photo, 0, 1) == [10, 10, 250]
    assert ("turned upright" in photo.line) == (orientation != UPRIGHT)


def test_a_photo_of_twelve_megapixels_is_made_smaller_in_its_own_shape(tmp_path):
    file = saved(two_halves(4000, 3000), tmp_path / "a.jpg", RIGHT_TOP)
    photo = read_photo(file, 1024)
    assert photo.pixels.shape == (1, 1024, 768, 3)
    assert photo.line == "a.jpg: 4000x3000, turned upright, made smaller to 768x1024"
    assert read_photo(file, 0).pixels.shape == (1, 4000, 3000, 3)
    # The left of the sensor is at the top of a photo that was taken upright.
    top, bottom = corner(photo, 0, 0), corner(photo, 1, 0)
    assert top[0] > 200 > top[2]
    assert bottom[2] > 200 > bottom[0]


def test_a_small_photo_stays_as_it_is(tmp_path):
    photo = read_photo(saved(two_halves(), tmp_path / "a.png"), 1024)
    assert photo.pixels.shape == (1, 16, 32, 3)
    assert photo.line == "a.png: 32x16"


def test_grey_of_16_bits_keeps_its_whole_range(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype("uint16").reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    pixels = read_photo(tmp_path / "a.png").pixels
    assert pixels.shape == (1, 8, 8, 3)
    assert torch.equal(pixels[..., 0], pixels[..., 2])
    # Half a step of 16 bits, and of fp32 in the product.
    assert torch.allclose(pixels[0, ..., 0].flatten(), torch.linspace(0, 1, 64), atol=1e-4)


@pytest.mark.parametrize(("mode", "kind"), [("L", "png"), ("L", "jpg"), ("1", "png")])
def test_grey_has_three_equal_channels(tmp_path, mode, kind):
    file = tmp_path / f"a.{kind}"
    Image.new("L", (16, 16), 255).convert(mode).save(file)
    assert torch.equal(read_photo(file).pixels, torch.ones(1, 16, 16, 3))


def test_cmyk_has_the_colours_it_is_printed_in(tmp_path):
    file = tmp_path / "a.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(file, quality=100)
    pixels = read_photo(file).pixels
    wanted = torch.tensor([1.0, 0.0, 0.0]).expand(1, 16, 16, 3)
    assert torch.allclose(pixels, wanted, atol=JPEG)


def test_transparency_stays_as_a_fourth_channel_and_opaque_pictures_have_none(tmp_path):
    clear = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    clear.paste((200, 0, 0, 255), (0, 0, 8, 16))
    clear.save(tmp_path / "a.png")
    photo = read_photo(tmp_path / "a.png")
    assert photo.pixels.shape[-1] == 4
    assert photo.pixels[0, :, :8, 3].min() == 1
    assert photo.pixels[0, :, 8:, 3].max() == 0
    assert "transparent parts are not learned" in photo.line
    palette = clear.convert("P")
    palette.save(tmp_path / "b.png", transparency=palette.getpixel((12, 12)))
    assert read_photo(tmp_path / "b.png").pixels.shape[-1] == 4
    Image.new("RGBA", (16, 16), (200, 0, 0, 255)).save(tmp_path / "c.png")
    assert read_photo(tmp_path / "c.png").pixels.shape[-1] == 3


def test_photos_come_in_the_order_a_person_counts_in_with_their_captions(tmp_path):
    for name in ("b10.png", "b9.PNG", "a.jpg"):
        two_halves().save(tmp_path / name)
    (tmp_path / "b9.txt").write_text("a <my-cat> in the snow\n", encoding="utf-8")
    (tmp_path / "phone.HEIC").write_bytes(b"unread")
    files, others = photo_files(tmp_path)
    assert [file.name for file in files] == ["a.jpg", "b9.PNG", "b10.png"]
    assert others == ["phone.HEIC"]
    seen = []
    photos = read_photos(files, before_each=lambda at, count: seen.append((at, count)))
    assert [photo.caption for photo in photos] == ["", "a <my-cat> in the snow", ""]
    assert seen == [(0, 3), (1, 3), (2, 3)]
    before = fingerprint(tmp_path)
    two_halves().save(tmp_path / "c.png")
    assert fingerprint(tmp_path) != before


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.jpg: expected a picture, .* save it again"):
        read_photo(tmp_path / "a.jpg")
    two_halves(200, 200).save(tmp_path / "b.png")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b\.png: expected a picture"):
        read_photo(tmp_path / "b.png")


def test_a_picture_beyond_what_pillow_opens_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    two_halves().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: .* found a larger one .* make it smaller"):
        read_photo(tmp_path / "a.png")


def test_folders_without_photos_and_outside_of_the_input_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("folder_paths.get_input_directory", lambda: str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert photo_folder("mine") == tmp_path / "mine"
    for name in ("", "..", "missing", "/", "mine/../.."):
        with pytest.raises(ValueError, match="expected a folder of photos inside"):
            photo_folder(name)
    with pytest.raises(ValueError, match="found none; put 4 to 6 photos"):
        photo_files(tmp_path / "mine")
    (tmp_path / "mine" / "a.heic").touch()
    with pytest.raises(ValueError, match=r"a\.heic, which cannot be read; save them as JPEG"):
        photo_files(tmp_path / "mine")
