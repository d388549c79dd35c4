"""A covariance in a .safetensors file, so that it is measured once for each text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

from ..files.safe_file import FileFormatError, read_untrusted, refuse, write_atomically
from .covariance import Covariance, Positions

FORMAT_VERSION = "1"
_MATRIX = "covariance"


def save_covariance(covariance: Covariance, path: Path) -> None:
    """Write a covariance in fp64, atomically; a missing folder is made."""
    metadata = {
        "perfusion_covariance_version": FORMAT_VERSION,
        "tokens": str(covariance.tokens),
        "captions": str(covariance.captions),
        "positions": covariance.positions,
        "encoder_hash": covariance.encoder_hash,
        "ridge": repr(covariance.ridge),
    }
    write_atomically(path, {_MATRIX: covariance.matrix.contiguous()}, metadata)


def load_covariance(path: Path) -> Covariance:
    """Read a covariance, trusting nothing in the file.

    Every fault raises `FileFormatError`, naming the file, the key, what was expected and found.
    """
    tensors, metadata = read_untrusted(path, ("F64",))
    version = metadata.get("perfusion_covariance_version", "none")
    if version != FORMAT_VERSION:
        refuse(path, "perfusion_covariance_version", FORMAT_VERSION, version)
    if list(tensors) != [_MATRIX]:
        refuse(path, "tensors", _MATRIX, ", ".join(tensors) or "none")
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
        )
    except (KeyError, ValueError) as error:
        raise FileFormatError(f"{path}: expected a covariance, found: {error}") from error
