"""A covariance survives its file, and a bad file is named."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from perfusion.files.safe_file import FILE_LIMIT, FileFormatError
from perfusion.gated.covariance import Covariance
from perfusion.gated.covariance_file import WIDTH_LIMIT, load_covariance, save_covariance


def covariance():
    rows = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Covariance(rows.mT @ rows / 50, 50, 7, "all", "abc", 1e-3)


def test_every_field_survives_to_the_bit(tmp_path):
    path = tmp_path / "inside" / "c.safetensors"
    save_covariance(covariance(), path)
    found = load_covariance(path)
    assert found.digest == covariance().digest
    for name in ("tokens", "captions", "positions", "encoder_hash", "ridge"):
        assert getattr(found, name) == getattr(covariance(), name)
    assert torch.equal(found.matrix, covariance().matrix)
    assert [file.name for file in path.parent.iterdir()] == ["c.safetensors"]


def test_the_parts_of_several_text_encoders_survive(tmp_path):
    matrix = torch.block_diag(covariance().matrix[:2, :2], covariance().matrix[2:, 2:])
    saved = replace(covariance(), matrix=matrix, parts=(2, 4))
    save_covariance(saved, tmp_path / "c.safetensors")
    found = load_covariance(tmp_path / "c.safetensors")
    assert found.parts == (2, 4)
    assert found.digest == saved.digest != replace(saved, parts=()).digest


GOOD = {
    "perfusion_covariance_version": "1",
    "tokens": "5",
    "captions": "2",
    "positions": "words",
    "encoder_hash": "x",
    "ridge": "0.001",
}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"covariance": torch.eye(3)}, {}, "F64"),
        ({"covariance": torch.eye(3).double()}, {"perfusion_covariance_version": "2"}, "version"),
        ({"other": torch.eye(3).double()}, {}, "expected covariance, found other"),
        ({"covariance": torch.eye(3).double()}, {"positions": "some"}, "words or all"),
        ({"covariance": torch.eye(3).double()}, {"tokens": "many"}, "invalid literal"),
        ({"covariance": torch.ones(3, 2).double()}, {}, "square"),
        ({"covariance": torch.full((2, 2), torch.nan).double()}, {}, "finite"),
        ({"covariance": torch.eye(3).double()}, {"parts": "2,2"}, "add up to 3"),
        ({"covariance": torch.eye(3).double()}, {"parts": "2,x"}, "invalid literal"),
        ({"covariance": torch.ones(3, 3).double()}, {"parts": "1,2"}, "between the parts"),
        ({"covariance": torch.eye(3).double()}, {"parts": "4,-1"}, "add up to 3"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, tensors, metadata, message):
    path = tmp_path / "bad.safetensors"
    safetensors.torch.save_file(tensors, path, {**GOOD, **metadata})
    with pytest.raises(FileFormatError, match=rf"bad\.safetensors.*{message}"):
        load_covariance(path)


def test_a_covariance_wider_than_any_concept_file_is_large_comes_back(tmp_path):
    """Width 3,000 takes 72 MB in fp64; a concept's file may have 64."""
    path = tmp_path / "wide.safetensors"
    wide = Covariance(torch.eye(3000, dtype=torch.float64), 9, 3, "all", "abc")
    save_covariance(wide, path)
    assert path.stat().st_size > FILE_LIMIT
    assert torch.equal(load_covariance(path).matrix, wide.matrix)


def test_t5_has_room_and_what_could_not_be_read_again_is_not_written(tmp_path):
    assert WIDTH_LIMIT >= 2 * 4096
    # One number seen as many: no memory is taken for a matrix nobody may write.
    size = WIDTH_LIMIT + 1
    huge = object.__new__(Covariance)
    object.__setattr__(huge, "matrix", torch.ones(1, 1, dtype=torch.float64).expand(size, size))
    with pytest.raises(ValueError, match=rf"up to {WIDTH_LIMIT}, found {size}"):
        save_covariance(huge, tmp_path / "huge.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("covariance", [6000, 6001], "a square matrix up to 8192 wide, found"),
        ("covariance", [9000, 9000], "a square matrix up to 8192 wide, found"),
        ("covariance", [36_000_000], "a square matrix up to 8192 wide, found"),
        ("covariance", [True, True], "a square matrix up to 8192 wide, found"),
        ("covariance", "many", "a square matrix up to 8192 wide, found"),
        ("payload", [6000, 6000], "expected covariance, found payload"),
        ("covariance", [3, 3], "content: expected a valid safetensors file"),
    ],
)
def test_a_hostile_file_takes_no_memory_before_it_is_refused(tmp_path, name, shape, message):
    """As large as a covariance may be, on paper: a sparse file takes no room on the disk."""
    path = tmp_path / "hostile.safetensors"
    data = 6000 * 6000 * 8 if shape != [3, 3] else 72 + 8
    entry = {"dtype": "F64", "shape": shape, "data_offsets": [0, data]}
    header = json.dumps({name: entry, "__metadata__": GOOD}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + data)
    tracemalloc.start()
    with pytest.raises(FileFormatError, match=message):
        load_covariance(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**20


def test_a_file_larger_than_the_widest_covariance_is_refused_by_its_size(tmp_path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(8 * WIDTH_LIMIT**2 * 4)
    with pytest.raises(FileFormatError, match="file size"):
        load_covariance(path)
