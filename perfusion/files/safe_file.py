"""Reading .safetensors from strangers, and writing them so that no half-written file remains."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

FILE_LIMIT = 64 * 2**20
HEADER_LIMIT = 4 * 2**20
METADATA_LIMIT = 256
DTYPES = ("F16", "BF16", "F32")
# Ending of files that are being written; only a killed process leaves one behind.
TEMPORARY = ".tmp"


class FileFormatError(ValueError):
    """A concept file that cannot be used; the message names file, key, expected and found."""


def refuse(path: Path, key: str, expected: str, found: object) -> NoReturn:
    """Raise the `FileFormatError` for one key; ``found`` is shortened and escaped."""
    shown = found if isinstance(found, str) else repr(found)
    if len(shown) > 120:
        shown = shown[:117] + "..."
    # What was found may come from the file: no control characters into a log or a terminal.
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
    raise FileFormatError(f"{path}: {key}: expected {expected}, found {shown}")


def read_untrusted(
    path: Path, dtypes: Sequence[str] = DTYPES
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, nothing of which was trusted before it was checked.

    Sizes, the header and every dtype are checked before any tensor is made; the format's own
    rules (offsets, overlaps) are those of the safetensors library. Raises `FileFormatError`.
    """
    content = _read_bounded(path)
    header = _parse_header(path, content)
    metadata = _checked_metadata(path, header.pop("__metadata__", {}))
    for key, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else entry
        if dtype not in dtypes:
            refuse(path, repr(key), f"one of the dtypes {', '.join(dtypes)}", dtype)
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:
        raise FileFormatError(
            f"{path}: content: expected a valid safetensors file, found: {error}; "
            "the file is damaged or incomplete, get it again"
        ) from error
    return tensors, metadata


def write_atomically(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a .safetensors file in one step (`replace_file`)."""
    replace_file(path, _in_order(safetensors.torch.save(dict(tensors), metadata=dict(metadata))))


def replace_file(path: Path, content: bytes) -> None:
    """Write any file in one step: readers see the old file or the new one.

    Whatever goes wrong (a full disk, an interrupt), no temporary file stays behind and the old
    file stays as it was; the error goes on its way.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is only atomic within one file system.
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}{TEMPORARY}"
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _in_order(content: bytes) -> bytes:
    """The same file with its metadata sorted by key.

    The library writes them in another order every time, and the same content is to be the same
    file, byte for byte.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]


def _read_bounded(path: Path) -> bytes:
    # Asked before opening: opening a pipe or a device could wait for ever.
    if not path.is_file():
        refuse(path, "file", "a regular file", "a folder or device" if path.exists() else "nothing")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > FILE_LIMIT:
                refuse(path, "file size", f"at most {FILE_LIMIT} bytes", f"{size} bytes")
            content = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise FileFormatError(
            f"{path}: file: expected a readable file, found: {error.strerror}"
        ) from error
    if not 8 < len(content) <= FILE_LIMIT:
        refuse(path, "file size", f"9 to {FILE_LIMIT} bytes", f"{len(content)} bytes")
    return content


def _parse_header(path: Path, content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    limit = min(HEADER_LIMIT, len(content) - 8)
    if length > limit:
        refuse(
            path,
            "header length",
            f"at most {limit} bytes (the file is truncated or not a safetensors file)",
            f"{length} bytes",
        )
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: header: expected JSON, found {type(error).__name__}; "
            "this is not a safetensors file or it is damaged"
        ) from error
    if not isinstance(header, dict):
        refuse(path, "header", "a JSON object", type(header).__name__)
    return header


def _checked_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or len(metadata) > METADATA_LIMIT:
        found = f"{len(metadata)}" if isinstance(metadata, dict) else type(metadata).__name__
        refuse(path, "__metadata__", f"an object of at most {METADATA_LIMIT} texts", found)
    checked: dict[str, str] = {}
    for key, value in metadata.items():
        if not isinstance(value, str):
            refuse(path, f"__metadata__ {key!r}", "a text", value)
        checked[key] = value
    return checked
