"""Masks in a real server: pictures of different sizes come as one list."""

from __future__ import annotations

import io

from PIL import Image

from dev.client import Client


def node(kind: str, **inputs: object) -> dict[str, object]:
    return {"class_type": kind, "inputs": inputs}


def test_a_list_of_pictures_of_different_sizes_is_masked_each_at_its_own(
    client: Client,
) -> None:
    scaled = {"upscale_method": "bicubic", "width": 96, "height": 72, "crop": "disabled"}
    prompt = {
        "1": node("PerfusionDemoModel"),
        "2": node("PerfusionDemoImages", subject="Bo the teddy", count=1, seed=0),
        "3": node("PerfusionDemoImages", subject="Bo the teddy", count=2, seed=7),
        "4": node("ImageScale", image=["3", 0], **scaled),
        "5": node("CreateList", **{"inputs.input0": ["2", 0], "inputs.input1": ["4", 0]}),
        "6": node(
            "PerfusionAutoMask",
            model=["1", 0],
            clip=["1", 1],
            vae=["1", 2],
            images=["5", 0],
            superclass="teddy",
        ),
        "7": node("MaskToImage", mask=["6", 0]),
        "8": node("SaveImage", images=["7", 0], filename_prefix="auto_mask"),
        "9": node("PreviewImage", images=["6", 1]),
        "10": node("PreviewAny", source=["6", 2]),
    }
    run = client.run(prompt)
    assert run.status == "execution_success", run.error
    masks = [Image.open(io.BytesIO(client.picture(each))) for each in run.images("output")]
    assert [mask.size for mask in masks] == [(64, 64), (96, 72), (96, 72)]
    for mask in masks:
        levels = list(mask.convert("L").getdata())
        assert 0.1 < sum(levels) / len(levels) / 255 < 0.5
    # The node itself shows the overlays and says what it found.
    assert [each["type"] for each in run.outputs["6"]["images"]] == ["temp"] * 3
    said = "\n".join(run.outputs["6"]["text"]).splitlines()
    assert len(said) == 3
    assert all("'teddy' covers" in line for line in said)
