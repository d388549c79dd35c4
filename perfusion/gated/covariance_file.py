"""A covariance in a .safetensors file, so that it is measured once for each text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast, get_args

from ..files.safe_file import (
    HEADER_LIMIT,
    FileFormatError,
    TensorEntry,
    read_untrusted,
    refuse,
    write_atomically,
)
from .covariance import Covariance, Positions

FORMAT_VERSION = "1"
WIDTH_LIMIT = 8192
"""The widest covariance a file holds: twice T5-XXL's 4,096, half a gigabyte."""
_FILE_LIMIT = 8 * WIDTH_LIMIT**2 + HEADER_LIMIT
_MATRIX = "covariance"


def save_covariance(covariance: Covariance, path: Path) -> None:
    """Write a covariance in fp64, atomically; a missing folder is made.

    Raises:
        ValueError: for one wider than `load_covariance` takes.
    """
    if covariance.width > WIDTH_LIMIT:
        raise ValueError(
            f"expected a covariance of a width up to {WIDTH_LIMIT}, found {covariance.width}; "
            "keep it in memory, or measure fewer dimensions"
        )
    metadata = {
        "perfusion_covariance_version": FORMAT_VERSION,
        "tokens": str(covariance.tokens),
        "captions": str(covariance.captions),
        "positions": covariance.positions,
        "encoder_hash": covariance.encoder_hash,
        "ridge": repr(covariance.ridge),
    }
    if covariance.parts:
        metadata["parts"] = ",".join(str(width) for width in covariance.parts)
    write_atomically(path, {_MATRIX: covariance.matrix.contiguous()}, metadata)


def load_covariance(path: Path) -> Covariance:
    """Read a covariance, trusting nothing in the file.

    Raises:
        FileFormatError: for every fault, naming the file, the key, what was expected and found.
    """

    def check(entries: Mapping[str, TensorEntry]) -> None:
        if list(entries) != [_MATRIX]:
            refuse(path, "tensors", _MATRIX, ", ".join(entries) or "none")
        shape = entries[_MATRIX].shape
        width = shape[0] if len(shape) == 2 else None
        if type(width) is not int or not 0 < width <= WIDTH_LIMIT or shape[1] != width:
            refuse(path, _MATRIX, f"a square matrix up to {WIDTH_LIMIT} wide", list(shape))

    tensors, metadata = read_untrusted(path, ("F64",), _FILE_LIMIT, check)
    version = metadata.get("perfusion_covariance_version", "none")
    if version != FORMAT_VERSION:
        refuse(path, "perfusion_covariance_version", FORMAT_VERSION, version)
    if metadata.get("positions") not in get_args(Positions):
        refuse(path, "positions", " or ".join(get_args(Positions)), metadata.get("positions"))
    try:
        return Covariance(
            matrix=tensors[_MATRIX],
            tokens=int(metadata["tokens"]),
            captions=int(metadata["captions"]),
            positions=cast("Positions", metadata["positions"]),
            encoder_hash=metadata["encoder_hash"],
            ridge=float(metadata["ridge"]),
            parts=tuple(int(width) for width in metadata.get("parts", "").split(",") if width),
        )
    except (KeyError, ValueError) as error:
        raise FileFormatError(f"{path}: expected a covariance, found: {error}") from error
