"""A covariance survives its file, and a bad file is named."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from perfusion import Covariance, FileFormatError, load_covariance, save_covariance


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
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, tensors, metadata, message):
    path = tmp_path / "bad.safetensors"
    safetensors.torch.save_file(tensors, path, {**GOOD, **metadata})
    with pytest.raises(FileFormatError, match=rf"bad\.safetensors.*{message}"):
        load_covariance(path)
