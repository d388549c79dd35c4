"""Photos as people have them, through the nodes in a real server into a training."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from dev.client import Client, Prompt, PromptRefused, Run
from dev.server import Server

TURNED = 6  # EXIF: the sensor's left edge is the top of the photo
TRAIN, PHOTOS = "train", "photos"


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Something to see, which JPEG can hold."""
    coarse = numpy.random.default_rng(seed).integers(0, 255, (6, 8, 3), "uint8")
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def cut_out(size: tuple[int, int]) -> Image.Image:
    """A thing in the middle, transparent around it."""
    picture = photo(size).convert("RGBA")
    alpha = Image.new("L", size, 0)
    alpha.paste(255, (size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4))
    picture.putalpha(alpha)
    return picture


def write_all(folder: Path) -> None:
    """One of each kind."""
    if (folder / "7 panorama.jpg").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = TURNED
    photo((4032, 3024)).save(folder / "1 phone.jpg", exif=exif)
    photo((640, 480)).convert("L").save(folder / "2 grey.jpg")
    photo((640, 480)).convert("CMYK").save(folder / "3 print.jpg")
    grey = numpy.asarray(photo((300, 300)).convert("L")).astype("uint16") * 257
    Image.fromarray(grey).save(folder / "4 scan 16 bit.png")
    cut_out((500, 400)).save(folder / "5 cut out.png")
    photo((24, 24)).save(folder / "6 tiny.png")
    photo((6000, 400)).save(folder / "7 panorama.jpg")


def training(**nodes: dict[str, Any]) -> Prompt:
    """Two steps in the small world; `nodes` are added, and `train` changes the training."""
    inputs = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": [PHOTOS, 0]}
    inputs |= {"superclass": "teddy", "placeholder": "<mine>", "steps": 2, "batch_size": 2}
    inputs |= {"learning_rate": 0.125, "embedding_learning_rate": 0.09, "seed": 0}
    inputs |= {"options": ["options", 0], **nodes.pop(TRAIN, {})}
    return {
        "1": node("PerfusionDemoModel"),
        "options": node("PerfusionTrainingOptions", sample_every=0),
        TRAIN: node("PerfusionTrainConcept", **inputs),
        "show": node("PreviewAny", source=[TRAIN, 4]),
        **nodes,
    }


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def run_with_hints(client: Client, prompt: Prompt) -> tuple[Run, list[tuple[str, str]]]:
    """The run, and (node, text) of every hint on the page."""
    hints: list[tuple[str, str]] = []

    def hear(kind: str, data: dict[str, Any]) -> None:
        if kind == "perfusion.hint":
            hints.append((data["node"], data["text"]))

    run = client.run(prompt, hear)
    return run, hints


def text_of(run: Run, name: str) -> str:
    assert run.status == "execution_success", run.error
    return "\n".join(run.outputs[name]["text"])


def new_log(server: Server, before: int) -> str:
    return server.log.read_bytes()[before:].decode("utf-8", "replace")


def log_size(server: Server) -> int:
    return server.log.stat().st_size


def test_a_folder_with_every_kind_of_photo_is_read_upright_and_trained_on_at_the_models_size(
    client: Client, comfy_server: Server
) -> None:
    write_all(comfy_server.base / "input" / "every kind")
    (comfy_server.base / "input" / "every kind" / "8 phone.heic").write_bytes(b"unread")
    before = log_size(comfy_server)
    run, hints = run_with_hints(
        client, training(photos=node("PerfusionLoadPhotos", folder="every kind"))
    )
    assert text_of(run, PHOTOS).splitlines() == [
        "7 photos",
        "1 phone.jpg: 4032x3024, turned upright, made smaller to 1536x2048",
        "2 grey.jpg: 640x480",
        "3 print.jpg: 640x480",
        "4 scan 16 bit.png: 300x300",
        "5 cut out.png: 500x400, transparent parts are not learned",
        "6 tiny.png: 24x24",
        "7 panorama.jpg: 6000x400, made smaller to 2048x137",
    ]
    shown = [
        Image.open(io.BytesIO(client.picture(each))).size for each in run.outputs[PHOTOS]["images"]
    ]
    assert shown[0] == (144, 192)
    assert shown[5] == (24, 24)
    report = text_of(run, TRAIN)
    # The small world's model draws 64x64; sides are multiples of 64.
    assert "1 picture of 1536x2048: cropped to the middle 1536x1536" in report
    assert "1 picture of 300x300: resized to 64x64" in report
    assert "1 picture of 24x24: as they are" in report
    log = new_log(comfy_server, before)
    assert "reading photo 7 of 7" in log
    assert "encoding picture 7 of 7" in log
    assert "the transparency of the pictures is their mask" in log
    assert [where for where, text in hints if "8 phone.heic" in text] == [PHOTOS]
    assert [where for where, text in hints if "24x24 are far below the 64x64" in text] == [TRAIN]


@pytest.mark.parametrize("count", [1, 50])
def test_one_photo_and_fifty_are_trained_on(
    client: Client, comfy_server: Server, count: int
) -> None:
    folder = comfy_server.base / "input" / f"there are {count}"
    folder.mkdir(parents=True)
    for at in range(count):
        photo((90 + 7 * at, 120), at).save(folder / f"{at}.jpg")
    run = client.run(training(photos=node("PerfusionLoadPhotos", folder=folder.name)))
    assert text_of(run, PHOTOS).startswith(f"{count} photo")
    assert text_of(run, TRAIN).startswith("2 steps")


def test_a_cancel_while_many_photos_are_encoded_does_not_wait_for_them(
    client: Client, comfy_server: Server
) -> None:
    folder = comfy_server.base / "input" / "large"
    folder.mkdir(parents=True)
    for at in range(30):
        photo((1600, 1200), at).save(folder / f"{at}.jpg")
    prompt = training(photos=node("PerfusionLoadPhotos", folder="large"))
    before = log_size(comfy_server)

    def cancel(kind: str, data: dict[str, Any]) -> None:
        if kind == "executing" and data["node"] == TRAIN:
            while "encoding picture 1 of 30" not in new_log(comfy_server, before):
                pass
            client.fetch("/interrupt", {"prompt_id": data["prompt_id"]})

    run = client.run(prompt, cancel)
    assert run.status == "execution_interrupted", run.error
    assert "encoding picture 30 of 30" not in new_log(comfy_server, before)


def test_a_cancel_while_photos_are_read_does_not_wait_for_them(
    client: Client, comfy_server: Server
) -> None:
    folder = comfy_server.base / "input" / "many"
    folder.mkdir(parents=True)
    for at in range(30):
        photo((1600, 1200), at).save(folder / f"{at}.jpg")
    before = log_size(comfy_server)

    def cancel(kind: str, data: dict[str, Any]) -> None:
        if kind == "executing" and data["node"] == PHOTOS:
            client.fetch("/interrupt", {"prompt_id": data["prompt_id"]})

    run = client.run(training(photos=node("PerfusionLoadPhotos", folder="many")), cancel)
    assert run.status == "execution_interrupted", run.error
    assert "reading photo 30 of 30" not in new_log(comfy_server, before)


def test_a_folder_that_is_not_there_is_refused_with_what_to_do(client: Client) -> None:
    prompt = training(photos=node("PerfusionLoadPhotos", folder="elsewhere"))
    with pytest.raises(PromptRefused, match=r"folder of photos inside .* found 'elsewhere'; make"):
        client.run(prompt)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("1 phone.jpg", "3024x4032"),
        ("2 grey.jpg", "640x480"),
        ("3 print.jpg", "640x480"),
        ("4 scan 16 bit.png", "300x300"),
        ("7 panorama.jpg", "6000x400"),
    ],
)
def test_load_image_with_its_mask_wired_works_for_pictures_without_transparency(
    client: Client, comfy_server: Server, name: str, size: str
) -> None:
    write_all(comfy_server.base / "input")
    before = log_size(comfy_server)
    run, hints = run_with_hints(
        client, training(photos=node("LoadImage", image=name), train={"mask": [PHOTOS, 1]})
    )
    assert f"1 picture of {size}: " in text_of(run, TRAIN)
    assert [text for _, text in hints if "Invert Mask" in text] == []
    assert "the transparency of the pictures" not in new_log(comfy_server, before)


def test_the_mask_of_a_transparent_picture_is_doubted_on_the_node_until_it_is_inverted(
    client: Client, comfy_server: Server
) -> None:
    write_all(comfy_server.base / "input")
    load = node("LoadImage", image="5 cut out.png")
    run, hints = run_with_hints(client, training(photos=load, train={"mask": [PHOTOS, 1]}))
    text_of(run, TRAIN)
    assert [where for where, text in hints if "put Invert Mask between" in text] == [TRAIN]
    invert = node("InvertMask", mask=[PHOTOS, 1])
    run, hints = run_with_hints(
        client, training(photos=load, invert=invert, train={"mask": ["invert", 0]})
    )
    text_of(run, TRAIN)
    assert [text for _, text in hints if "Invert Mask" in text] == []
