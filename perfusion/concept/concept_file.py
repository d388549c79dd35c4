"""The format of a concept file: one small .safetensors per concept (method section 4).

Tensors: ``embedding.<encoder>``, ``i``, ``u``, ``superclass_encoding``, ``o_v`` and, for trained
keys, ``o_k``. The outputs of all layers lie in one tensor, one after the other; the metadata's
``layers`` is their table, JSON ``[[name, d], ...]``, each name to be completed by
``layer_suffix``. Everything else is in the metadata under the names below.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.safe_file import FileFormatError, read_untrusted, refuse, write_atomically
from ..gated.gate import Gate
from .concept import LAYER_LIMIT, TRAINED_LOCKS, Concept
from .metadata import modelspec

FORMAT_VERSION = "1"
DTYPES = (torch.float16, torch.float32)
# How far the rounding of u may move a similarity before u is kept in fp32.
SIMILARITY_TOLERANCE = 1e-3

_OWN_KEYS = (
    "perfusion_version",
    "family",
    "placeholder",
    "superclass",
    "key_lock",
    "gate",
    "train_gate",
    "energy",
    "layers",
    "layer_suffix",
)


def save_concept(concept: Concept, path: Path | str, dtype: torch.dtype = torch.float16) -> Path:
    """Write a concept as .safetensors in fp16 (or fp32), atomically; returns the path written.

    A missing folder is made.

    Raises:
        ValueError: for another suffix or dtype, for a concept with a schedule, for metadata that
            takes one of the format's own keys, and for values fp16 cannot hold.
        OSError: when the disk refuses, leaving no partial file and any former one untouched.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"expected a path ending in .safetensors, found {path.name!r}")
    if concept.schedule is not None:
        raise ValueError(
            f"concept '{concept.placeholder}' has a schedule, which a file does not keep; save the "
            "concept as it was before the schedule"
        )
    tensors, metadata = encode(concept, dtype)
    write_atomically(path, tensors, metadata)
    return path


def load_concept(path: Path | str) -> Concept:
    """Read a concept file, trusting nothing in it; tensors come as fp32 on the CPU.

    Raises:
        FileFormatError: for every fault, naming the file, the key, what was expected and found.
    """
    path = Path(path)
    return decode(path, *read_untrusted(path))


def encode(concept: Concept, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a concept's file; ``dtype`` float16 or float32.

    Raises:
        ValueError: for another dtype, for metadata that takes one of the format's own keys, and
            for values the dtype cannot hold.
    """
    if dtype not in DTYPES:
        raise ValueError(f"expected dtype float16 or float32, found {dtype}")
    taken = sorted(set(_OWN_KEYS) & set(concept.metadata))
    if taken:
        raise ValueError(f"metadata: expected none of the format's own keys, found {taken}")
    return _tensors(concept, dtype), _metadata(concept)


def decode(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Concept:
    """The concept in the content of the file ``path``; tensors become fp32.

    Every key is checked for presence and form, and the layer table against the tensors.

    Raises:
        FileFormatError: naming the file, the key, what was expected and what was found.
    """
    version = metadata.get("perfusion_version")
    if version is None:
        refuse(path, "perfusion_version", "a Perfusion concept file", "no such key")
    if version != FORMAT_VERSION:
        expected = f"format version {FORMAT_VERSION} (a newer file needs a newer pack)"
        refuse(path, "perfusion_version", expected, repr(version))
    for key in _OWN_KEYS:
        if key not in metadata:
            refuse(path, key, "this key in the metadata", "no such key")
    texts = {key: metadata[key] for key in _OWN_KEYS}
    layers = _layer_table(path, texts["layers"], texts["layer_suffix"])
    (energy,) = _numbers(path, "energy", texts["energy"], 1)
    has_keys = texts["key_lock"] == "trained"
    if texts["key_lock"] not in TRAINED_LOCKS:
        expected = f"one of {', '.join(map(repr, TRAINED_LOCKS))}"
        refuse(path, "key_lock", expected, repr(texts["key_lock"]))
    _check_tensors(path, tensors, has_keys)
    vectors = {key: tensor.float() for key, tensor in tensors.items()}
    fields: dict[str, Any] = {
        "family": texts["family"],
        "placeholder": texts["placeholder"],
        "superclass": texts["superclass"],
        "embeddings": {
            key.removeprefix("embedding."): vector
            for key, vector in vectors.items()
            if key.startswith("embedding.")
        },
        "i": vectors["i"],
        "u": _rescaled(path, vectors["i"], vectors["u"], energy),
        "superclass_encoding": vectors["superclass_encoding"],
        "o_v": _split(path, "o_v", vectors["o_v"], layers),
        "o_k": _split(path, "o_k", vectors["o_k"], layers) if has_keys else None,
        "twin_locked": texts["key_lock"] == "twin",
        "gate": _gate(path, "gate", texts["gate"], 3),
        "train_gate": _gate(path, "train_gate", texts["train_gate"], 2),
        "metadata": {key: value for key, value in metadata.items() if key not in _OWN_KEYS},
    }
    try:
        # The file's own, so that saving what was loaded writes the very same number.
        return Concept(**fields).with_energy(energy)
    except ValueError as error:
        raise FileFormatError(f"{path}: {error}") from error


def _gate(path: Path, key: str, text: str, count: int) -> Gate:
    numbers = _numbers(path, key, text, count)
    try:
        return Gate(*numbers)
    except ValueError as error:
        raise FileFormatError(f"{path}: {key}: {error}") from error


def _tensors(concept: Concept, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {f"embedding.{name}": vector for name, vector in concept.embeddings.items()}
    tensors["i"] = concept.i
    tensors["superclass_encoding"] = concept.superclass_encoding
    tensors["o_v"] = torch.cat(list(concept.o_v.values()))
    if concept.o_k is not None:
        tensors["o_k"] = torch.cat(list(concept.o_k.values()))
    stored = {key: tensor.detach().to("cpu", dtype) for key, tensor in tensors.items()}
    stored["u"] = _storable_dual(concept, dtype)
    for key, tensor in stored.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{key}: expected values {dtype} can hold, found larger ones")
    return {key: tensor.contiguous() for key, tensor in stored.items()}


def _storable_dual(concept: Concept, dtype: torch.dtype) -> Tensor:
    """``u``, which only matters up to scale, moved to where fp16 keeps most of its range.

    The scale is a power of two, so it costs nothing; ``energy`` in the metadata restores it. u
    and e may cancel in s = u.e / energy: where rounding could then show, u stays in fp32.
    """
    u = concept.u.detach().to("cpu", torch.float64)
    i = concept.i.detach().to("cpu", torch.float64)
    exponent = 14 - math.ceil(math.log2(float(u.abs().max())))
    scaled = torch.ldexp(u, torch.tensor(exponent))
    rounding = torch.finfo(dtype).eps / 2 * float((u * i).norm()) / concept.energy
    return scaled.to(torch.float32 if rounding > SIMILARITY_TOLERANCE else dtype)


def _rescaled(path: Path, i: Tensor, u: Tensor, energy: float) -> Tensor:
    # Concept checks the shapes and the sign; here only what the division needs.
    if i.shape != u.shape or i.ndim != 1:
        refuse(path, "u", f"the shape of i, {tuple(i.shape)}", str(tuple(u.shape)))
    stored = float(i.double() @ u.double())
    if not (0 < stored < math.inf and 0 < energy < math.inf):
        refuse(path, "energy", "a positive energy i.u", f"{energy} and i.u = {stored}")
    return (u.double() * (energy / stored)).float()


def _metadata(concept: Concept) -> dict[str, str]:
    suffix = _common_suffix(list(concept.o_v))
    layers = [[name.removesuffix(suffix), size] for name, size in concept.layers.items()]
    own = {
        "perfusion_version": FORMAT_VERSION,
        "family": concept.family,
        "placeholder": concept.placeholder,
        "superclass": concept.superclass,
        "key_lock": concept.key_lock,
        "gate": _compact([concept.gate.bias, concept.gate.temperature, concept.gate.strength]),
        "train_gate": _compact([concept.train_gate.bias, concept.train_gate.temperature]),
        "energy": _compact([concept.energy]),
        "layers": _compact(layers),
        "layer_suffix": suffix,
    }
    return dict(concept.metadata) | modelspec(concept) | own


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _common_suffix(names: list[str]) -> str:
    """The dotted ending all layer names share; it is half of an SD1.x layer table."""
    if len(names) < 2:
        return ""
    first, *others = names
    starts = [at for at, character in enumerate(first) if character == "."]
    # Ever shorter endings: the first one they all have is the longest.
    shared = (first[at:] for at in starts if all(n.endswith(first[at:]) for n in others))
    return next(shared, "")


def _json(path: Path, key: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        refuse(path, key, "JSON", repr(text))


def _numbers(path: Path, key: str, text: str, count: int) -> list[float]:
    values = _json(path, key, text)
    expected = f"a JSON list of {count} finite number(s)"
    if not isinstance(values, list) or len(values) != count:
        refuse(path, key, expected, repr(text))
    for value in values:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        # The bound first: float() of an endless integer would overflow.
        if not (plain and abs(value) <= 1e30 and math.isfinite(value)):
            refuse(path, key, expected, repr(text))
    return [float(value) for value in values]


def _layer_table(path: Path, text: str, suffix: str) -> dict[str, int]:
    rows = _json(path, "layers", text)
    if not isinstance(rows, list) or not 0 < len(rows) <= LAYER_LIMIT:
        found = f"{len(rows)} rows" if isinstance(rows, list) else type(rows).__name__
        refuse(path, "layers", f"a JSON list of 1 to {LAYER_LIMIT} rows [name, d]", found)
    table: dict[str, int] = {}
    for row in rows:
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)):
            refuse(path, "layers", "rows [name, d]", repr(row))
        name, size = row[0] + suffix, row[1]
        if type(size) is not int or not 0 < size <= 2**20:
            refuse(path, "layers", f"a width from 1 to {2**20} for {name}", repr(size))
        if name in table:
            refuse(path, "layers", "every layer once", f"{name} twice")
        table[name] = size
    return table


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], has_keys: bool) -> None:
    expected = {"i", "u", "superclass_encoding", "o_v"} | ({"o_k"} if has_keys else set())
    found = {key for key in tensors if not key.startswith("embedding.")}
    if found == tensors.keys():
        refuse(path, "embedding.<encoder>", "a token vector", "no such key")
    for key in sorted(expected - found):
        refuse(path, key, "this tensor", "no such key")
    for key in sorted(found - expected):
        refuse(path, repr(key), "no other tensors than the format's", "this one")


def _split(path: Path, key: str, packed: Tensor, layers: Mapping[str, int]) -> dict[str, Tensor]:
    total = sum(layers.values())
    if packed.shape != (total,):
        expected = f"shape ({total},), the sum of the layer table"
        refuse(path, key, expected, str(tuple(packed.shape)))
    pieces = packed.split(list(layers.values()))
    return {name: piece.clone() for name, piece in zip(layers, pieces, strict=True)}
