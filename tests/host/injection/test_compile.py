"""Concepts under ComfyUI's own TorchCompileModel node: the same numbers, no stale graphs."""

from __future__ import annotations

import comfy.ldm.modules.attention as attention
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import TorchCompileModel, skip_torch_compile_dict
from comfyui_perfusion.host.injection.apply import apply_concepts
from torch._dynamo.utils import counters

PROMPT = "a <0> and <1>"


@pytest.fixture(scope="module")
def world(worlds):
    """A model, its text encoder and two concepts; small, for compilers are slow."""
    model, clip = worlds.new_model("small"), worlds.clip("sd1")
    concepts = [worlds.fitting_concept(model, clip, at, f"<{at}>") for at in (0, 1)]
    return model, clip, concepts


@pytest.fixture(autouse=True)
def _traceable(monkeypatch):
    """ComfyUI's choice with --use-pytorch-cross-attention; its default asks psutil mid-graph."""
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def traced(model):
    """As TorchCompileModel, with the backend that only traces."""
    clone = model.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model=clone, backend="eager", options=options)
    return clone


def test_base_one_and_two_concepts_in_turn_never_reuse_each_others_graph(worlds, world):
    model, clip, (first, second) = world
    one, clip_one = apply_concepts(model, clip, [first])
    both, clip_both = apply_concepts(one, clip_one, [second])
    expected = [worlds.sample(patcher, clip_both, PROMPT) for patcher in (model, one, both)]
    compiled = [traced(model), traced(one), traced(both)]
    for turn in range(2):
        for patcher, wanted in zip(compiled, expected, strict=True):
            assert torch.equal(worlds.sample(patcher, clip_both, PROMPT), wanted), turn
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


def test_concepts_applied_after_compiling_take_effect(worlds, world):
    model, clip, (concept, _) = world
    eager, clip_patched = apply_concepts(model, clip, [concept])
    expected = worlds.sample(eager, clip_patched, PROMPT)
    after, _ = apply_concepts(traced(model), clip, [concept])
    assert torch.equal(worlds.sample(after, clip_patched, PROMPT), expected)


def test_another_gate_needs_no_new_graph(worlds, world):
    model, clip, (concept, _) = world
    for bias in (0.4, 0.5, 0.6):
        gated = concept.with_gate(bias=bias)
        patched, clip_patched = apply_concepts(model, clip, [gated])
        expected = worlds.sample(patched, clip_patched, PROMPT)
        assert torch.equal(worlds.sample(traced(patched), clip_patched, PROMPT), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_global_key_lock_needs_one_graph_and_the_same_numbers(worlds, world):
    model, clip, concepts = world
    patched, clip_patched = apply_concepts(model, clip, concepts, "global")
    expected = worlds.sample(patched, clip_patched, PROMPT)
    assert torch.equal(worlds.sample(traced(patched), clip_patched, PROMPT), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # A prompt with a second encoding means nothing to a compiled model without concepts.
    plain = worlds.sample(model, clip_patched, PROMPT)
    assert torch.equal(worlds.sample(traced(model), clip_patched, PROMPT), plain)


def test_the_node_itself_agrees_within_the_compilers_tolerance(worlds, world):
    model, clip, concepts = world
    patched, clip_patched = apply_concepts(model, clip, concepts)
    expected = worlds.sample(patched, clip_patched, PROMPT)
    (compiled,) = TorchCompileModel.execute(patched, "inductor").args
    found = worlds.sample(compiled, clip_patched, PROMPT)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, rtol=1e-4, atol=1e-4)
