"""Reading .safetensors from strangers, and writing them so that no half-written file remains."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

# The most bytes of a file and of its header, for formats that need no more.
FILE_LIMIT = 64 * 2**20
HEADER_LIMIT = 4 * 2**20
METADATA_LIMIT = 256
DTYPES = ("F16", "BF16", "F32")
# Ending of files that are being written; only a killed process leaves one behind.
TEMPORARY = ".tmp"


class FileFormatError(ValueError):
    """A file of ours that cannot be used; the message names file, key, expected and found."""


@dataclass(frozen=True)
class TensorEntry:
    """What a file's header says of one tensor; nothing in it was checked but the dtype."""

    dtype: str
    shape: tuple[object, ...]


def refuse(path: Path, key: str, expected: str, found: object) -> NoReturn:
    """Raise the `FileFormatError` for one key; ``found`` is shortened and escaped.

    Raises:
        FileFormatError: always.
    """
    shown = found if isinstance(found, str) else repr(found)
    if len(shown) > 120:
        shown = shown[:117] + "..."
    # What was found may come from the file: no control characters into a log or a terminal.
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
    raise FileFormatError(f"{path}: {key}: expected {expected}, found {shown}")


def read_untrusted(
    path: Path,
    dtypes: Sequence[str] = DTYPES,
    limit: int = FILE_LIMIT,
    check: Callable[[Mapping[str, TensorEntry]], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, nothing of which was trusted before it was checked.

    Sizes, the header and every dtype are checked before anything else is read, so a hostile file
    takes no more memory than a good one of its kind; the format's own rules (offsets, overlaps)
    are those of the safetensors library.

    Args:
        path: the file.
        dtypes: names of the dtypes its tensors may have, as safetensors writes them.
        limit: the most bytes it may have.
        check: looks at what the header says of the tensors; may `refuse`.

    Returns:
        Tensors by name, and the metadata.

    Raises:
        FileFormatError: for every fault, naming the file, the key, what was expected and found.
    """
    # Asked before opening: opening a pipe or a device could wait for ever.
    if not path.is_file():
        refuse(path, "file", "a regular file", "a folder or device" if path.exists() else "nothing")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not 8 < size <= limit:
                refuse(path, "file size", f"9 to at most {limit} bytes", f"{size} bytes")
            beginning = _read_header(path, file, size)
            header = _parsed(path, beginning[8:])
            metadata = _checked_metadata(path, header.pop("__metadata__", {}))
            entries = _checked_entries(path, header, dtypes)
            if check is not None:
                check(entries)
            # One byte more than there was shows a file that grows while it is read.
            content = beginning + file.read(size - len(beginning) + 1)
    except OSError as error:
        raise FileFormatError(
            f"{path}: file: expected a readable file, found: {error.strerror}"
        ) from error
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


def _read_header(path: Path, file: BinaryIO, size: int) -> bytes:
    """The eight bytes that say how long the header is, and the header."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    limit = min(HEADER_LIMIT, size - 8)
    if length > limit:
        refuse(
            path,
            "header length",
            f"at most {limit} bytes (the file is truncated or not a safetensors file)",
            f"{length} bytes",
        )
    return start + file.read(length)


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: header: expected JSON, found {type(error).__name__}; "
            "this is not a safetensors file or it is damaged"
        ) from error
    if not isinstance(header, dict):
        refuse(path, "header", "a JSON object", type(header).__name__)
    return header


def _checked_entries(
    path: Path, header: Mapping[str, Any], dtypes: Sequence[str]
) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for key, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else entry
        if not isinstance(dtype, str) or dtype not in dtypes:
            refuse(path, repr(key), f"one of the dtypes {', '.join(dtypes)}", dtype)
        # What is no list here is left for the library to refuse.
        shape = entry.get("shape") if isinstance(entry, dict) else None
        entries[key] = TensorEntry(dtype, tuple(shape) if isinstance(shape, list) else ())
    return entries


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
