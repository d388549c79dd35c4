"""Files from strangers: every fault is one clear error, and none of them harms."""

from __future__ import annotations

import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perfusion.concept.concept import Concept
from perfusion.concept.concept_file import load_concept, save_concept
from perfusion.files.safe_file import FILE_LIMIT, HEADER_LIMIT, FileFormatError


@pytest.fixture
def path(small_concept: Concept, tmp_path: Path) -> Path:
    return save_concept(small_concept, tmp_path / "mine.safetensors")


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return load_file(path), header["__metadata__"]


def with_header(content: bytes, header: Any) -> bytes:
    length = int.from_bytes(content[:8], "little")
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def header_of(content: bytes) -> dict[str, Any]:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def refused(path: Path, key: str, *fragments: str) -> str:
    """Load, expect the error, and that it names the file, the key and the fragments."""
    with pytest.raises(FileFormatError) as caught:
        load_concept(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert key in message
    assert re.search("expected .*found", message, re.DOTALL)
    assert message.isprintable()
    assert len(message) < 500 + len(str(path))
    for fragment in fragments:
        assert fragment in message
    return message


@pytest.mark.parametrize(
    ("key", "value", "fragments"),
    [
        ("perfusion_version", None, ["a Perfusion concept file", "no such key"]),
        ("perfusion_version", "99", ["format version 1", "'99'"]),
        ("family", None, ["no such key"]),
        ("family", "../../sd1", ["../../sd1"]),
        ("placeholder", "../../evil", ["../../evil"]),
        ("placeholder", "a\x1b[31mb", ["visible characters"]),
        ("placeholder", "a b", ["one word"]),
        ("superclass", "", ["1 to 128"]),
        ("key_lock", "global", ["'local', 'twin', 'trained'", "'global'"]),
        ("key_lock", None, ["no such key"]),
        ("gate", "[0.6,0.1]", ["3 finite number(s)", "[0.6,0.1]"]),
        ("gate", "[0.6,0.1,NaN]", ["finite"]),
        ("gate", "[0.6,0.1,1e400]", ["finite"]),
        ("gate", "[0.6,0.1,true]", ["finite"]),
        ("gate", '[0.6,0.1,"1"]', ["finite"]),
        ("gate", "[0.6,0.1,1" + "0" * 400 + "]", ["finite"]),
        ("gate", "{", ["JSON"]),
        ("gate", "[" * 100_000, ["JSON"]),
        ("gate", "[0.6,0,1]", ["temperature", "above 0"]),
        ("train_gate", "[0.75]", ["2 finite number(s)"]),
        ("energy", "[0]", ["positive energy"]),
        ("energy", "[-1]", ["positive energy"]),
        ("energy", "[1e31]", ["finite"]),
        ("layers", None, ["no such key"]),
        ("layers", "not json", ["JSON"]),
        ("layers", "[" * 100_000, ["JSON"]),
        ("layers", "{}", ["rows [name, d]", "dict"]),
        ("layers", "[]", ["1 to 4096"]),
        ("layers", '[["a",1]]', ["o_v", "shape (1,)", "(21,)"]),
        ("layers", '[["a",-1],["b",22]]', ["a width from 1"]),
        ("layers", '[["a",0],["b",21]]', ["a width from 1"]),
        ("layers", '[["a",true],["b",20]]', ["a width from 1", "True"]),
        ("layers", '[["a",21.0]]', ["a width from 1"]),
        ("layers", '[["a",1e999]]', ["a width from 1"]),
        ("layers", '[["a",6],["a",15]]', ["every layer once"]),
        ("layers", '[["a"]]', ["rows [name, d]"]),
        ("layers", "[[1,21]]", ["rows [name, d]"]),
        ("layers", '[["../a",21]]', ["layer", "../a"]),
        ("layers", json.dumps([[f"n{n}", 1] for n in range(5000)]), ["1 to 4096", "5000 rows"]),
        ("layer_suffix", "/../x", ["layer", "a name of letters"]),
        ("layer_suffix", None, ["no such key"]),
        ("modelspec.thumbnail", "javascript:alert(1)", ["data:image/"]),
    ],
)
def test_metadata_that_is_missing_or_wrong_is_named(path, key, value, fragments):
    tensors, metadata = parts(path)
    if value is None:
        del metadata[key]
    else:
        metadata[key] = value
    save_file(tensors, path, metadata=metadata)
    refused(path, "", *([key] if value is None else []), *fragments)


@pytest.mark.parametrize("key", ["embedding.l", "i", "u", "superclass_encoding", "o_v"])
def test_every_tensor_is_missed_by_name(path, key):
    tensors, metadata = parts(path)
    del tensors[key]
    save_file(tensors, path, metadata=metadata)
    refused(path, "embedding." if key.startswith("emb") else f": {key}:", "no such key")


@pytest.mark.parametrize("key", ["embedding.l", "i", "u", "superclass_encoding", "o_v"])
@pytest.mark.parametrize("fault", ["nan", "inf", "matrix", "integer", "double", "empty", "longer"])
def test_every_tensor_of_wrong_content_shape_or_dtype_is_named(path, key, fault):
    tensors, metadata = parts(path)
    good = tensors[key]
    if fault in ("nan", "inf"):
        bad = good.clone()
        bad[-1] = float(fault)
    else:
        bad = {
            "matrix": good.reshape(1, -1),
            "integer": good.to(torch.int32),
            "double": good.double(),
            "empty": good[:0],
            "longer": torch.cat([good, good]),
        }[fault]
    save_file({**tensors, key: bad}, path, metadata=metadata)
    if (key, fault) == ("embedding.l", "longer"):
        # Any width may be right for an encoder this package knows nothing of.
        assert load_concept(path).embeddings["l"].shape == (16,)
        return
    refused(path, "")


def test_a_tensor_the_format_does_not_know_is_refused(path):
    tensors, metadata = parts(path)
    save_file({**tensors, "payload": torch.ones(3)}, path, metadata=metadata)
    refused(path, "payload")


def test_trained_keys_must_be_there_exactly_when_announced(path):
    tensors, metadata = parts(path)
    save_file(tensors, path, metadata={**metadata, "key_lock": "trained"})
    refused(path, ": o_k:", "no such key")
    save_file({**tensors, "o_k": tensors["o_v"].clone()}, path, metadata=metadata)
    refused(path, "o_k")


def test_a_negative_energy_of_the_stored_vectors_is_refused(path):
    tensors, metadata = parts(path)
    save_file({**tensors, "u": -tensors["u"]}, path, metadata=metadata)
    refused(path, ": energy:")


@pytest.mark.parametrize(
    ("header", "key"),
    [
        (b"", "header"),
        (b"\xff\xfe", "header"),
        (b"[]", "header"),
        (b"null", "header"),
        (b"{" * 10, "header"),
        (b'{"a":' * 100_000, "header"),
        (b"[" * 100_000, "header"),
        ({"__metadata__": []}, "__metadata__"),
        ({"__metadata__": {"family": 1}}, "__metadata__"),
        ({"__metadata__": {"family": {"a": "b"}}}, "__metadata__"),
        ({"__metadata__": {str(n): "" for n in range(300)}}, "__metadata__"),
        ({"i": 3}, "'i'"),
        ({"i": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}, "'i'"),
        ({"i": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "'i'"),
        ({"i": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "content"),
        ({"i": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 4]}}, "content"),
        ({"i": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}, "content"),
        ({"i": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, "content"),
        ({"i": {"dtype": "F32"}}, "content"),
        ({"i": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, ""),
        ({}, ""),
    ],
)
def test_a_hostile_header_is_refused(path, header, key):
    path.write_bytes(with_header(path.read_bytes(), header))
    refused(path, key)


def test_overlapping_tensors_are_refused(path):
    content = path.read_bytes()
    header = header_of(content)
    header["u"]["data_offsets"] = header["i"]["data_offsets"]
    path.write_bytes(with_header(content, header))
    refused(path, "content", "damaged or incomplete")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        b"\x00" * 9,
        b"\xff" * 8 + b"{}",
        b"PK\x03\x04" + b"\x00" * 200,
        b"\x80\x02}q\x00." * 40,
        b"<!DOCTYPE html><html>not found</html>",
        (2**63).to_bytes(8, "little") + b"{}" * 50,
    ],
)
def test_what_is_no_safetensors_file_is_refused(path, content):
    path.write_bytes(content)
    refused(path, "")


def test_a_huge_header_is_refused_by_its_length_alone(path):
    length = HEADER_LIMIT + 1
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(8 + length)
    refused(path, "header length", f"at most {HEADER_LIMIT} bytes", f"{length} bytes")


def test_a_huge_file_is_refused_before_it_is_read(path):
    with path.open("r+b") as file:
        file.truncate(FILE_LIMIT * 1000)  # sparse: takes no room on the disk
    refused(path, "file size", f"at most {FILE_LIMIT}")


def test_what_is_no_file_is_refused(tmp_path):
    refused(tmp_path / "none.safetensors", "file", "nothing")
    refused(tmp_path, "file", "a folder or device")


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes of this kind exist on POSIX only")
def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", "file", "a folder or device")


def test_every_truncation_is_refused(path):
    content = path.read_bytes()
    for length in range(0, len(content), 13):
        path.write_bytes(content[:length])
        refused(path, "")


def test_random_damage_is_refused_or_harmless(path):
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    chance = random.Random(11)
    loaded = 0
    for trial in range(900):
        damaged = bytearray(content)
        # Mostly the header: among random places it would be hit too seldom.
        end = len(content) if trial % 3 == 0 else header_end
        for _ in range(chance.choice((1, 1, 2, 8))):
            damaged[chance.randrange(end)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            concept = load_concept(path)
        except FileFormatError:
            continue
        loaded += 1
        assert concept.energy > 0
        assert all(torch.isfinite(output).all() for output in concept.o_v.values())
    # Damage to weights alone cannot be noticed; most damage must be.
    assert 0 < loaded < 600


def test_a_message_shows_no_raw_control_characters_of_the_file(path):
    tensors, metadata = parts(path)
    save_file(tensors, path, metadata={**metadata, "key_lock": "\x1b[2J\nowned\u202e" * 100})
    refused(path, "key_lock")
