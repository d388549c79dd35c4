"""What works on every model that ComfyUI supports is what docs/models.md says.

The table there is the only one: its rows are read here, each of ComfyUI's classes is built as its
loader builds it, and what the pack says to it is compared with the row.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import comfy.model_detection
import pytest
from comfyui_perfusion.host.models.editable import edited_as
from comfyui_perfusion.host.models.families import (
    FAMILIES,
    UnsupportedModelError,
    cross_attentions,
    family_of,
)
from comfyui_perfusion.host.models.text_entries import TEXT_ENTRIES
from comfyui_perfusion.host.models.unsupported import CONCEPTS, EDITS

from tests.host.models.every_model import SETTINGS, Built, build, names

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"
# ComfyUI tells these by what is written beside the weights, or by names that it changes on loading.
TOLD_OTHERWISE = {"WAN21_CausalAR_T2V", "WAN21_FlowRVS", "PixelDiTT2I"}


@dataclass(frozen=True)
class Row:
    """One row of the table: what it says of some of ComfyUI's classes."""

    model: str
    classes: tuple[str, ...]
    concepts: str
    edits: str


def rows() -> list[Row]:
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and "`" in cells[1]:
            found.append(Row(cells[0], tuple(re.findall(r"`(\w+)`", cells[1])), *cells[2:]))
    return found


ROWS = {name: row for row in rows() for name in row.classes}


def works(cell: str) -> str | None:
    """The name of what works, None for a reason why nothing does."""
    match = re.fullmatch(r"\*\*`(\w+)`\*\*", cell)
    return match and match[1]


def test_every_class_of_comfyui_stands_in_one_row_of_the_table():
    listed = Counter(name for row in rows() for name in row.classes)
    assert listed == Counter(names())


def test_every_row_of_ours_is_in_the_table_and_nothing_else_is_said_to_work():
    ours = {family.name for family in FAMILIES} - {"small_world"}
    entries = {entry.name for entry in TEXT_ENTRIES}
    assert {works(row.concepts) for row in rows()} - {None} == ours
    assert {works(row.edits) for row in rows()} - {None} <= ours | entries
    assert entries <= {works(row.edits) for row in rows()}


@pytest.mark.parametrize("name", names())
def test_what_works_on(name):
    model, row = build(name), ROWS[name]
    if name not in TOLD_OTHERWISE:
        weights = {**model.diffusion_model.state_dict(), **SETTINGS.get(name, Built()).state()}
        found = comfy.model_detection.model_config_from_unet(weights, "")
        assert type(found).__name__ == name, "the network is not what ComfyUI takes for this class"
    assert sum(entry.fits(model.diffusion_model) for entry in TEXT_ENTRIES) <= 1
    concepts, edits = works(row.concepts), works(row.edits)
    called = type(model).__name__
    if concepts is not None:
        assert family_of(model).name == concepts
        assert cross_attentions(model)
    else:
        with pytest.raises(UnsupportedModelError) as refused:
            family_of(model)
        said = str(refused.value)
        assert said.startswith(called)
        assert f"cannot take concepts: {row.concepts}; supported are Stable Diffusion 1.x" in said
        assert (EDITS in said) == (edits is not None)
    if edits is not None:
        assert edited_as(model).name == edits
        return
    with pytest.raises(UnsupportedModelError) as refused:
        edited_as(model)
    said = str(refused.value)
    assert said.startswith(called)
    assert f"cannot be edited in closed form: {row.edits}. What works: Stable Diffusion" in said
    assert (CONCEPTS in said) == (concepts is not None)


RELATIVES = {
    "Ovis-Image, of Flux's": (
        "Flux",
        {"vec_in_dim": None, "yak_mlp": True, "txt_norm": True},
    ),
    "NewBie, of Lumina's": ("Lumina2", {"clip_text_dim": 1024}),
    "Z-Image with pictures, of Z-Image's": ("ZImage", {"siglip_feat_dim": 1152}),
    "SD3 with layers over its text": ("SD3", {"context_processor_layers": 2}),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_a_relative_of_another_structure_is_not_taken_for_the_model(name):
    model = build(*RELATIVES[name])
    with pytest.raises(UnsupportedModelError, match="cannot be edited in closed form"):
        edited_as(model)
    with pytest.raises(UnsupportedModelError, match="cannot take concepts"):
        family_of(model)
