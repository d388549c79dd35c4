"""What a concept says about itself, in its file and to a person."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace

import pytest
import safetensors
from safetensors.torch import load_file, save_file

from perfusion.concept.concept_file import load_concept, save_concept
from perfusion.concept.metadata import (
    PACK_VERSION,
    THUMBNAIL,
    describe,
    with_origin,
    with_thumbnail,
)
from perfusion.gated.gate_schedule import GateSchedule

VERSIONS = {"ComfyUI": "0.30.0", "torch": "2.11.0+cu128"}
HASH = "0011223344556677"
# A file as the first version of the pack wrote it: nothing of what is recorded since.
OLD = ("made_with", "images_hash", "modelspec.trigger_phrase")


def metadata_of(path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata()


def lines_of(text: str) -> dict[str, str]:
    """The lines of a description by what stands before their colon."""
    return dict(line.split(": ", 1) for line in text.splitlines())


def test_the_pack_names_the_version_it_is_published_under(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == PACK_VERSION


@pytest.mark.parametrize(
    ("which", "architecture"),
    [
        ("sd1_concept", "stable-diffusion-v1/perfusion"),
        ("sdxl_concept", "stable-diffusion-xl-v1-base/perfusion"),
        ("small_concept", "small_world/perfusion"),
    ],
)
def test_a_file_has_the_keys_other_programs_look_for(which, architecture, request, tmp_path):
    concept = request.getfixturevalue(which)
    found = metadata_of(save_concept(concept, tmp_path / "a.safetensors"))
    assert found["modelspec.architecture"] == architecture
    assert found["modelspec.implementation"] == "perfusion"
    assert found["modelspec.title"] == found["modelspec.trigger_phrase"] == "<my-cat>"


def test_a_title_may_be_given_and_a_wrong_trigger_phrase_may_not(small_concept, tmp_path):
    given = {"modelspec.title": "Our cat", "modelspec.trigger_phrase": "dog"}
    concept = replace(small_concept, metadata={**small_concept.metadata, **given})
    found = metadata_of(save_concept(concept, tmp_path / "a.safetensors"))
    assert found["modelspec.title"] == "Our cat"
    assert found["modelspec.trigger_phrase"] == "<my-cat>"


def test_an_origin_is_recorded_and_comes_back_from_the_file(small_concept, tmp_path):
    concept = with_origin(small_concept, VERSIONS, HASH)
    found = load_concept(save_concept(concept, tmp_path / "a.safetensors"))
    made_with = f"perfusion {PACK_VERSION}, ComfyUI 0.30.0, torch 2.11.0+cu128"
    assert found.metadata["made_with"] == made_with
    assert found.metadata["images_hash"] == HASH
    assert "images_hash" not in with_origin(small_concept, VERSIONS).metadata


def test_an_sd15_file_stays_within_32_kib_with_all_that_is_recorded(sd1_concept, tmp_path):
    concept = with_origin(sd1_concept, VERSIONS, HASH)
    path = save_concept(concept, tmp_path / "a.safetensors")
    assert path.stat().st_size <= 32 * 1024


def test_an_sdxl_file_stays_within_185_kib_with_all_that_is_recorded(sdxl_concept, tmp_path):
    path = save_concept(with_origin(sdxl_concept, VERSIONS, HASH), tmp_path / "a.safetensors")
    assert path.stat().st_size <= 185 * 1024


def test_the_same_concept_makes_the_same_file_byte_for_byte(sd1_concept, tmp_path):
    concept = with_origin(sd1_concept, VERSIONS, HASH)
    contents = {
        save_concept(concept, tmp_path / f"{at}.safetensors").read_bytes() for at in range(8)
    }
    assert len(contents) == 1
    turned = replace(concept, metadata=dict(reversed(concept.metadata.items())))
    assert save_concept(turned, tmp_path / "turned.safetensors").read_bytes() in contents


def test_texts_of_every_alphabet_survive_in_a_file(small_concept, tmp_path):
    title = 'кот "猫" \\ \n🐈'
    concept = replace(small_concept, metadata={"modelspec.title": title})
    path = save_concept(concept, tmp_path / "a.safetensors")
    assert metadata_of(path)["modelspec.title"] == title
    assert load_concept(path).metadata["modelspec.title"] == title


def test_a_thumbnail_is_added_and_anything_but_a_picture_is_refused(small_concept):
    url = "data:image/jpeg;base64,AAAA"
    assert with_thumbnail(small_concept, url).metadata[THUMBNAIL] == url
    with pytest.raises(ValueError, match=r"modelspec\.thumbnail: expected a data:image/ URL"):
        with_thumbnail(small_concept, "https://example.org/cat.jpg")


def test_a_description_holds_everything_a_concept_knows(sd1_concept):
    concept = with_origin(sd1_concept, VERSIONS, HASH).with_gate(bias=0.55)
    found = lines_of(describe(concept, "JPEG, 256 x 256"))
    assert found["trigger phrase"] == "<my-cat>"
    assert found["superclass"] == "cat"
    assert found["family"] == "sd1, architecture stable-diffusion-v1/perfusion"
    assert found["keys"] == "locked to cat"
    assert found["gate"] == "bias 0.55, temperature 0.15, strength 1"
    assert found["training gate"] == "bias 0.75, temperature 0.1"
    assert found["token vectors"] == "l (768)"
    assert found["encoding width"].startswith("768, energy ")
    assert found["layers"].startswith("16 (widths: 5 of 320, 5 of 640, 6 of 1280), input_blocks.1")
    assert found["size"] == "15552 numbers, 31.1 kB in half precision"
    assert found["seed"] == str(2**64 - 1)
    for setting in ("steps 400", "batch_size 16", "learning_rate 0.03", "images 6"):
        assert setting in found["training"]
    assert found["covariance"] == "0123456789abcdef"
    assert found["text encoder"] == "fedcba9876543210"
    assert found["training images"] == HASH
    assert "ComfyUI 0.30.0" in found["made with"]
    assert found["thumbnail"] == "JPEG, 256 x 256"


def test_a_description_counts_trained_keys_and_names_a_schedule(trained_keys_concept):
    schedule = GateSchedule(0.2, 0.8, (0.6, 0.7), (0.15, 0.15), ("middle",))
    found = lines_of(describe(trained_keys_concept.with_schedule(schedule)))
    assert found["keys"] == "trained"
    assert found["size"].startswith(f"{8 + 3 * 8 + 2 * 10} numbers")
    assert found["schedule, not kept in a file"] == (
        "from 0.2 to 0.8 of the sampling, bias 0.6 to 0.7, temperature 0.15 to 0.15, blocks middle"
    )


def test_an_old_file_is_described_with_what_it_has(small_concept, tmp_path):
    path = save_concept(small_concept, tmp_path / "a.safetensors")
    old = {k: v for k, v in metadata_of(path).items() if k not in OLD and "modelspec" not in k}
    save_file(load_file(path), path, metadata=old)
    found = lines_of(describe(load_concept(path)))
    assert found["trigger phrase"] == "<my-cat>"
    assert found["made with"] == found["training images"] == "not recorded"
    assert lines_of(describe(replace(small_concept, metadata={})))["training"] == "not recorded"


@pytest.mark.parametrize(
    "training",
    ["no JSON", "[1, 2]", "[" * 100_000, '{"seed": {"a": [1]}}', "1" * 10_000, '{"steps": 1e999}'],
)
def test_training_settings_of_any_form_are_only_shown(small_concept, training):
    text = describe(replace(small_concept, metadata={"training": training}))
    assert len(text) < 4000
    assert "training: " in text


def test_texts_of_a_stranger_are_one_visible_line_each_and_cut(small_concept):
    bad = "\x1b[31mred\x00\u202etxt.exe\ntrigger phrase: owned " + "x" * 100_000
    metadata = {"modelspec.title": bad, bad: "y", "training": json.dumps({bad: bad})}
    metadata |= {f"key{n}": "z" * 5000 for n in range(200)}
    text = describe(replace(small_concept, metadata=metadata))
    assert all(character.isprintable() for line in text.splitlines() for character in line)
    assert [line for line in text.splitlines() if line.startswith("trigger phrase")] == [
        "trigger phrase: <my-cat>"
    ]
    assert len(text) < 40_000
    assert text.endswith("more entries")


def test_a_thumbnails_text_is_not_shown(small_concept):
    concept = with_thumbnail(small_concept, "data:image/jpeg;base64,QUJDREVG")
    assert "QUJDREVG" not in describe(concept)
