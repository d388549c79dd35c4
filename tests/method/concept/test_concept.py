"""The concept value and its file: what goes in comes out, in the size promised."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from perfusion.concept.concept import Concept
from perfusion.concept.concept_file import load_concept, save_concept
from perfusion.concept.metadata import describe
from perfusion.gated.gate import Gate
from perfusion.gated.gate_schedule import GateSchedule
from perfusion.gated.rank_one import Direction, similarities

resource = pytest.importorskip("resource") if sys.platform != "win32" else None


def assert_same(found: Concept, expected: Concept, tolerance: float) -> None:
    for name in ("family", "placeholder", "superclass", "key_lock", "layers"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("gate", "train_gate"):
        assert getattr(found, name) == getattr(expected, name), name
    assert list(found.layers) == list(expected.layers)
    pairs = [(found.i, expected.i), (found.u, expected.u)]
    pairs.append((found.superclass_encoding, expected.superclass_encoding))
    for name in ("embeddings", "o_v", "o_k"):
        ours, theirs = getattr(found, name) or {}, getattr(expected, name) or {}
        assert ours.keys() == theirs.keys()
        pairs += [(ours[key], theirs[key]) for key in ours]
    for one, other in pairs:
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize("which", ["small_concept", "trained_keys_concept", "sdxl_concept"])
def test_a_concept_comes_back_as_it_was_saved(which, dtype, tolerance, request, tmp_path):
    concept = request.getfixturevalue(which).with_gate(bias=0.55, temperature=0.2, strength=0.8)
    path = save_concept(concept, tmp_path / "sub" / "mine.safetensors", dtype)
    found = load_concept(path)
    assert_same(found, concept, tolerance)
    assert concept.metadata.items() <= found.metadata.items()
    assert math.isclose(found.energy, concept.energy, rel_tol=1e-5)


def test_saving_what_was_loaded_changes_nothing_more(small_concept, tmp_path):
    first = load_concept(save_concept(small_concept, tmp_path / "a.safetensors"))
    second = load_concept(save_concept(first, tmp_path / "b.safetensors"))
    assert_same(second, first, 1e-6)
    assert second.metadata == first.metadata


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_file_that_is_loaded_and_saved_again_and_again_stays_the_same(
    sd1_concept, dtype, tmp_path
):
    path = save_concept(sd1_concept, tmp_path / "a.safetensors", dtype)
    path = save_concept(load_concept(path), tmp_path / "b.safetensors", dtype)
    for again in ("c", "d"):
        newest = save_concept(
            load_concept(path).with_gate(strength=1.0), tmp_path / f"{again}.safetensors", dtype
        )
        assert newest.read_bytes() == path.read_bytes()
    assert load_concept(path).energy == sd1_concept.energy


def test_an_sd15_concept_takes_at_most_32_kb(sd1_concept, tmp_path):
    assert sum(sd1_concept.layers.values()) == 12_480
    assert len(sd1_concept.layers) == 16
    path = save_concept(sd1_concept, tmp_path / "sd15.safetensors")
    assert path.stat().st_size <= 32 * 1024


def test_an_sdxl_concept_takes_about_185_kb(sdxl_concept, tmp_path):
    assert sum(sdxl_concept.layers.values()) == 83_200
    assert len(sdxl_concept.layers) == 70
    path = save_concept(sdxl_concept, tmp_path / "sdxl.safetensors")
    assert 170_000 < path.stat().st_size <= 185 * 1024


def test_the_file_says_what_it_is_to_any_safetensors_reader(small_concept, tmp_path):
    thumbnail = "data:image/png;base64,iVBORw0KGgo="
    concept = replace(
        small_concept,
        metadata={**small_concept.metadata, "modelspec.thumbnail": thumbnail},
    )
    path = save_concept(concept, tmp_path / "mine.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert keys == {"embedding.l", "i", "u", "superclass_encoding", "o_v"}
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"] == "small_world/perfusion"
    assert metadata["modelspec.title"] == "<my-cat>"
    assert metadata["modelspec.thumbnail"] == thumbnail
    assert json.loads(metadata["training"])["seed"] == 2**64 - 1
    assert load_concept(path).metadata["modelspec.thumbnail"] == thumbnail


def clip_covariance() -> torch.Tensor:
    """C of CLIP ViT-L/14 as the oracle package ships it: ill-conditioned like real encodings."""
    spec = importlib.util.find_spec("perfusion_pytorch")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "data" / "covariance_CLIP_ViT-L-14.pt"
    return torch.load(path, map_location="cpu", weights_only=True).double()


def similarity_shift(concept: Concept, path: Path, tokens: torch.Tensor) -> float:
    before = similarities(tokens, [concept.direction()])
    after = similarities(tokens, [load_concept(save_concept(concept, path)).direction()])
    return float((after - before).abs().max())


def test_fp16_storage_keeps_similarities_with_the_covariance_of_a_real_encoder(
    sd1_concept, tmp_path
):
    random = torch.Generator().manual_seed(1)
    metric = clip_covariance()
    root = torch.linalg.cholesky(metric)
    tokens = torch.randn(500, 768, generator=random, dtype=torch.float64) @ root.mT
    i = tokens[0]
    concept = replace(sd1_concept, i=i.float(), u=torch.linalg.solve(metric, i).float())
    assert similarity_shift(concept, tmp_path / "a.safetensors", tokens) < 2e-4
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.get_tensor("u").dtype == torch.float16


def test_a_dual_that_fp16_would_spoil_is_kept_in_fp32(small_concept, tmp_path):
    # Two large components that cancel in u.e: what an ill-conditioned covariance leads to.
    i = torch.tensor([1.0, 1.0, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0])
    u = torch.tensor([1e3, -1e3 + 0.3, 0.1, 1e-9, 0.0, 0.0, 0.0, 0.0])
    concept = replace(small_concept, i=i, u=u)
    tokens = i + 1e-4 * torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    assert similarity_shift(concept, tmp_path / "a.safetensors", tokens) < 2e-3
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.get_tensor("u").dtype == torch.float32
    rounded = Direction(i.half().float(), u.half().float(), Gate(0.6, 0.1))
    exact = similarities(tokens, [concept.direction()])
    assert float((similarities(tokens, [rounded]) - exact).abs().max()) > 2e-2


def test_what_fp16_cannot_hold_is_refused_and_fp32_holds_it(small_concept, tmp_path):
    concept = replace(small_concept, embeddings={"l": torch.full((8,), 1e5)})
    path = tmp_path / "mine.safetensors"
    with pytest.raises(ValueError, match=r"embedding\.l: expected values torch\.float16"):
        save_concept(concept, path)
    assert list(tmp_path.iterdir()) == []
    assert_same(load_concept(save_concept(concept, path, torch.float32)), concept, 1e-6)


def test_saving_refuses_other_suffixes_dtypes_and_its_own_metadata_keys(small_concept, tmp_path):
    with pytest.raises(ValueError, match=r"ending in \.safetensors, found 'mine\.pt'"):
        save_concept(small_concept, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=r"float16 or float32, found torch\.int8"):
        save_concept(small_concept, tmp_path / "mine.safetensors", torch.int8)
    taken = replace(small_concept, metadata={"family": "sd1"})
    with pytest.raises(ValueError, match=r"own keys, found \['family'\]"):
        save_concept(taken, tmp_path / "mine.safetensors")


@pytest.mark.skipif(resource is None, reason="file size limits exist on POSIX only")
def test_a_full_disk_leaves_the_old_file_and_nothing_else(small_concept, sd1_concept, tmp_path):
    import signal

    path = save_concept(small_concept, tmp_path / "mine.safetensors")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            save_concept(sd1_concept, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.safetensors"]


def test_saving_over_a_file_replaces_it_whole(small_concept, trained_keys_concept, tmp_path):
    path = save_concept(small_concept, tmp_path / "mine.safetensors")
    save_concept(trained_keys_concept, path)
    assert load_concept(path).key_lock == "trained"
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.safetensors"]


def test_another_gate_leaves_everything_else(small_concept):
    changed = small_concept.with_gate(bias=0.5, strength=0.0)
    assert changed.gate == Gate(0.5, 0.15, 0.0)
    assert changed.o_v is small_concept.o_v
    direction = changed.direction()
    assert (direction.gate.bias, direction.gate.strength, direction.name) == (0.5, 0.0, "<my-cat>")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("placeholder", "", "placeholder: expected 1 to 128 characters"),
        ("placeholder", "x" * 129, "placeholder: expected 1 to 128 characters"),
        ("placeholder", "my cat", "placeholder: expected one word"),
        ("placeholder", "..", "placeholder: expected"),
        ("placeholder", "../etc", "placeholder: expected visible characters"),
        ("placeholder", "a\\b", "placeholder: expected visible characters"),
        ("placeholder", "cat\x00", "placeholder: expected visible characters"),
        ("placeholder", "cat\u202etac", "placeholder: expected visible characters"),
        ("placeholder", "(cat:1.2)", "placeholder: expected visible characters"),
        ("superclass", "cat\n", "superclass: expected"),
        ("superclass", "bird\tbath", "superclass: expected visible characters"),
        ("family", "sd1/../x", "family: expected a name of letters"),
        ("family", "", "family: expected a name of letters"),
        ("embeddings", {}, "embeddings: expected a vector"),
        ("embeddings", {"l": torch.ones(2, 2)}, r"embedding\.l: expected .*vector, found \(2, 2\)"),
        ("i", torch.ones(8) * math.nan, "i: expected finite values"),
        ("i", torch.ones(8, dtype=torch.int64), "i: expected a floating-point vector"),
        ("u", torch.ones(7), "u: expected 8 values, found 7"),
        ("u", -torch.ones(8), "u: expected a positive energy"),
        ("superclass_encoding", torch.ones(9), "superclass_encoding: expected 8 values, found 9"),
        ("o_v", {}, "o_v: expected 1 to 4096 layers, found 0"),
        ("o_v", {"a/b": torch.ones(3)}, "layer: expected a name"),
        ("o_v", {"a..b": torch.ones(3)}, "layer: expected a name"),
        ("o_k", {"blocks.0.attn2": torch.ones(6)}, "o_k: expected the 3 layers of o_v"),
        ("metadata", {"modelspec.thumbnail": "http://x/y.png"}, "modelspec.thumbnail: expected"),
    ],
)
def test_a_concept_whose_pieces_do_not_fit_is_refused(small_concept, field, value, message):
    if field == "u" and value.shape == (8,):
        value = -small_concept.u
    if field == "i" and value.is_floating_point() and value.shape == (8,):
        value = small_concept.i * math.nan
    with pytest.raises(ValueError, match=message):
        replace(small_concept, **{field: value})


@pytest.mark.parametrize("word", ["<my-cat>", "sks", "S0", "кот", "猫", "mug_2"])
def test_ordinary_placeholders_are_accepted(small_concept, word, tmp_path):
    path = save_concept(replace(small_concept, placeholder=word), tmp_path / "a.safetensors")
    assert load_concept(path).placeholder == word


def test_a_superclass_of_several_words_is_accepted(small_concept):
    assert replace(small_concept, superclass="bird bath").superclass == "bird bath"


class NoTensors(TorchDispatchMode):
    """Within this context nothing may be computed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


def test_another_gate_schedule_or_text_looks_at_no_vector_again(small_concept):
    with NoTensors():
        gated = small_concept.with_gate(bias=0.5, strength=0.3)
        scheduled = gated.with_schedule(GateSchedule(0, 1, (0.5, 0.5), (0.1, 0.1)))
        said = scheduled.with_metadata({"note": "mine"})
    assert said.gate == Gate(0.5, small_concept.gate.temperature, 0.3)
    assert said.schedule is scheduled.schedule is not None
    assert said.metadata["note"] == "mine"
    assert "note" not in small_concept.metadata
    assert said.o_v is small_concept.o_v
    assert said.energy == small_concept.energy
    with pytest.raises(ValueError, match="temperature"):
        small_concept.with_gate(temperature=0)
    with pytest.raises(ValueError, match="data:image/"):
        small_concept.with_metadata({"modelspec.thumbnail": "javascript:alert(1)"})


def test_a_concept_remembers_that_it_was_trained_with_twin_lock(small_concept, tmp_path):
    concept = replace(small_concept, twin_locked=True)
    path = save_concept(concept, tmp_path / "twin.safetensors")
    found = load_concept(path)
    assert (small_concept.key_lock, found.key_lock) == ("local", "twin")
    assert "twin lock" in describe(found)


def test_keys_of_its_own_and_a_twin_lock_are_refused(trained_keys_concept):
    with pytest.raises(ValueError, match="o_k: expected no keys of its own"):
        replace(trained_keys_concept, twin_locked=True)
