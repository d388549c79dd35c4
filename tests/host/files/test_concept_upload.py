"""Concept files a stranger hands in: checked, named safely, never over another one."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
from comfyui_perfusion.host.files.concept_files import FOLDER
from comfyui_perfusion.host.files.concept_upload import keep_dropped
from comfyui_perfusion.perfusion.files.safe_file import FileFormatError

SHIPPED = Path(__file__).parents[3] / "demo" / "concepts"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    paths = folder_paths.folder_names_and_paths[FOLDER]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, ([str(tmp_path)], paths[1]))
    return tmp_path


@pytest.fixture
def content():
    return (SHIPPED / "bo.safetensors").read_bytes()


def test_a_concept_is_kept_as_it_is(folder, content):
    assert keep_dropped("bo.safetensors", content) == "bo.safetensors"
    assert (folder / "bo.safetensors").read_bytes() == content
    assert len(list(folder.iterdir())) == 1


def test_the_same_concept_again_is_not_kept_twice(folder, content):
    keep_dropped("bo.safetensors", content)
    assert keep_dropped("bo.safetensors", content) == "bo.safetensors"
    assert len(list(folder.iterdir())) == 1


def test_another_concept_of_the_same_name_gets_a_number(folder, content):
    keep_dropped("bo.safetensors", content)
    other = (SHIPPED / "olli.safetensors").read_bytes()
    assert keep_dropped("bo.safetensors", other) == "bo_1.safetensors"
    assert (folder / "bo.safetensors").read_bytes() == content


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../escape.safetensors", "escape.safetensors"),
        ("..\\..\\escape.safetensors", "escape.safetensors"),
        ("/etc/passwd", "passwd.safetensors"),
        (".hidden.safetensors", "hidden.safetensors"),
        ("", "concept.safetensors"),
        ("a b\n<c>.safetensors", "a_b_c_.safetensors"),
    ],
)
def test_a_name_cannot_lead_out_of_the_folder(folder, content, name, kept):
    assert keep_dropped(name, content) == kept
    assert [path.name for path in folder.iterdir()] == [kept]


@pytest.mark.parametrize("end", [0, 7, 100, -1])
def test_a_damaged_file_is_refused_by_its_name_and_leaves_nothing(folder, content, end):
    with pytest.raises(FileFormatError, match=r"broken\.safetensors"):
        keep_dropped("broken.safetensors", content[:end])
    assert list(folder.iterdir()) == []
