"""What the nodes say of a concept, and the small picture its file may carry."""

from __future__ import annotations

import base64
import random
from dataclasses import replace
from io import BytesIO

import comfyui_version
import folder_paths
import pytest
import torch
from comfyui_perfusion.host.files.concept_files import SHIPPED, signed
from comfyui_perfusion.host.pictures.thumbnails import URL_LIMIT, thumbnail_of, thumbnail_url
from comfyui_perfusion.nodes.concepts import (
    PerfusionConceptInfo,
    PerfusionLoadConcept,
    PerfusionSaveConcept,
)
from comfyui_perfusion.perfusion.concept.metadata import with_thumbnail
from PIL import Image


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty models/perfusion, and a place for previews."""
    _, extensions = folder_paths.folder_names_and_paths["perfusion"]
    place = tmp_path / "concepts"
    place.mkdir()
    entry = ([str(place)], extensions)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "perfusion", entry)
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    folder_paths.filename_list_cache.pop("perfusion", None)
    yield place
    folder_paths.filename_list_cache.pop("perfusion", None)


@pytest.fixture(scope="module")
def concept(worlds):
    return worlds.concept("sd1")


def picture(height: int = 300, width: int = 400) -> torch.Tensor:
    """A gradient with a disc in the middle, (1, H, W, 3)."""
    rows = torch.linspace(0, 1, height)[:, None].expand(height, width)
    columns = torch.linspace(0, 1, width)[None].expand(height, width)
    disc = ((rows - 0.5) ** 2 + (columns - 0.5) ** 2 < 0.04).float()
    return torch.stack([rows, columns, disc], -1)[None]


def url_of(image: Image.Image, kind: str, **options: object) -> str:
    file = BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def middle_square(image: torch.Tensor) -> torch.Tensor:
    _, height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top : top + side, left : left + side, :3]


def resized(image: torch.Tensor, side: int) -> torch.Tensor:
    channels = torch.nn.functional.interpolate(image.movedim(-1, 1), (side, side), mode="area")
    return channels.movedim(1, -1)


def test_a_thumbnail_is_saved_loaded_and_shown(concept, folder, tmp_path):
    given = picture()
    PerfusionSaveConcept.execute(concept, "plain")
    saved = PerfusionSaveConcept.execute(concept, "with", given)
    sizes = {file.name[:4]: file.stat().st_size for file in folder.iterdir()}
    assert 0 < sizes["with"] - sizes["plai"] < URL_LIMIT + 64
    (loaded,) = PerfusionLoadConcept.execute("with_00001_.safetensors").args
    assert loaded.metadata["modelspec.thumbnail"] == saved.args[0].metadata["modelspec.thumbnail"]
    output = PerfusionConceptInfo.execute(loaded)
    text, image, trigger = output.args
    assert trigger == "<thing>"
    assert "trigger phrase: <thing>" in text
    assert "thumbnail: JPEG, 256 x 256" in text
    assert image.shape == (1, 256, 256, 3)
    assert float((image - resized(middle_square(given), 256)).abs().mean()) < 0.02
    assert output.ui["text"] == (text,)
    (shown,) = output.ui["images"]
    assert (tmp_path / "temp" / shown["filename"]).is_file()


def test_saving_twice_gives_the_same_file_with_and_without_a_thumbnail(concept, folder):
    for _ in range(2):
        PerfusionSaveConcept.execute(concept, "without")
        PerfusionSaveConcept.execute(concept, "with", picture())
    for name in ("without", "with"):
        first, second = ((folder / f"{name}_{n:05}_.safetensors").read_bytes() for n in (1, 2))
        assert first == second


def test_without_a_thumbnail_the_picture_is_plain_grey_and_the_text_says_so(concept):
    text, image, _ = PerfusionConceptInfo.execute(concept).args
    assert "thumbnail: none in the file; a plain grey picture stands in for it" in text
    assert torch.equal(image, torch.full_like(image, 0.5))


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.safetensors")), ids=lambda file: file.stem)
def test_the_shipped_concepts_are_described_whatever_they_record(file, folder):
    (folder / file.name).write_bytes(file.read_bytes())
    (concept,) = PerfusionLoadConcept.execute(file.name).args
    text, _, trigger = PerfusionConceptInfo.execute(concept).args
    assert trigger == f"<{file.stem.partition('_')[0]}>"
    assert "family: small_world" in text
    assert "seed: 0" in text


def test_a_trained_concept_is_signed_with_the_versions_that_made_it(concept):
    found = signed(concept, "0123456789abcdef").metadata
    assert f"ComfyUI {comfyui_version.__version__}" in found["made_with"]
    assert f"torch {torch.__version__}" in found["made_with"]
    assert found["images_hash"] == "0123456789abcdef"


@pytest.mark.parametrize("size", [(64, 64), (1, 500), (500, 1), (2000, 300), (300, 400)])
@pytest.mark.parametrize("kind", ["gradient", "noise", "black and white noise"])
def test_a_thumbnail_of_any_picture_keeps_within_its_limit(concept, size, kind):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, *size, 4, generator=generator)
    given = {"gradient": picture(*size), "noise": noise}.get(kind, (noise > 0.5).float())
    url = thumbnail_url(given)
    assert len(url) <= URL_LIMIT
    assert thumbnail_url(given) == url
    image, note = thumbnail_of(with_thumbnail(concept, url))
    assert note.startswith("JPEG")
    assert image.shape[1] == image.shape[2] >= 128


def test_the_most_detailed_thumbnail_still_fits():
    generator = torch.Generator().manual_seed(0)
    noise = (torch.rand(1, 128, 128, 3, generator=generator) > 0.5).float()
    assert len(thumbnail_url(noise)) <= URL_LIMIT


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 8, 8, 3), r"found \(0, 8, 8, 3\)"),
        (torch.zeros(8, 8, 3), r"found \(8, 8, 3\)"),
        (torch.full((1, 8, 8, 3), torch.nan), "NaN or infinity"),
    ],
)
def test_what_is_no_picture_makes_no_thumbnail(images, message):
    with pytest.raises(ValueError, match=message):
        thumbnail_url(images)


def small(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new(mode, size, 1 if mode == "1" else "red")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_other_programs_put_in_are_shown(concept, kind):
    image, note = thumbnail_of(with_thumbnail(concept, url_of(small(), kind)))
    assert note.startswith(f"{kind}, 40 x 30")
    assert torch.allclose(image, torch.tensor([1.0, 0.0, 0.0]).expand_as(image), atol=0.05)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/",
        "data:image/jpeg;base64,",
        "data:image/jpeg;base64,no base64 at all!",
        "data:image/jpeg;base64,кот",
        "data:image/jpeg;base64," + base64.b64encode(b"\x00" * 500).decode(),
        "data:image/svg+xml,<svg onload='alert(1)'/>",
        url_of(small(), "GIF"),
        url_of(small(), "EPS"),
        url_of(small(), "PDF"),
        url_of(small(), "TIFF"),
        url_of(small("1", (1025, 2)), "PNG"),
        # 400 million pixels in a few kB.
        url_of(small("1", (20_000, 20_000)), "PNG"),
        url_of(small(size=(300, 300)), "JPEG")[:400],
    ],
)
def test_a_thumbnail_that_cannot_be_read_is_plain_grey_and_said_to_be(concept, url):
    image, note = thumbnail_of(with_thumbnail(concept, url))
    assert note.startswith("cannot be read (")
    assert torch.equal(image, torch.full_like(image, 0.5))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_random_damage_to_a_thumbnail_never_breaks_the_node(concept, kind):
    head, text = url_of(small(size=(60, 60)), kind).split(",")
    content = base64.b64decode(text)
    chance = random.Random(3)
    for trial in range(150):
        damaged = bytearray(
            content[: chance.randrange(len(content))] if trial % 4 == 0 else content
        )
        for _ in range(chance.choice((1, 2, 8))):
            if damaged:
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        url = f"{head},{base64.b64encode(bytes(damaged)).decode()}"
        image, note = thumbnail_of(with_thumbnail(concept, url))
        assert torch.isfinite(image).all()
        assert note.startswith((kind, "cannot be read"))


def test_a_title_of_a_stranger_is_shown_as_text_only(concept):
    title = "<script>alert(1)</script>\n\x1b[2J"
    text, _, _ = PerfusionConceptInfo.execute(
        replace(concept, metadata={"modelspec.title": title})
    ).args
    (line,) = [line for line in text.splitlines() if line.startswith("modelspec.title")]
    assert "\x1b" not in text
    assert line.startswith("modelspec.title: <script>alert(1)</script> ")
