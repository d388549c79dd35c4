"""Twin lock beside what else a graph does, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses

import comfy.ldm.modules.attention as attention
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_execution.utils import CurrentNodeContext
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import cross_attentions
from comfyui_perfusion.host.text.placeholders import PlaceholderError
from comfyui_perfusion.host.text.twin import TwinEncoding, untwined, with_twin, within_twin
from comfyui_perfusion.host.text.twin_vectors import twin_vector
from comfyui_perfusion.perfusion.gated.twin_lock import twin_gates, twin_inputs
from torch._dynamo.utils import counters

import nodes as comfy_nodes

FAMILY = "sd1_light"
PROMPT, TWIN_PROMPT = "a <a> on the beach", "a cat on the beach"
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@pytest.fixture(scope="module")
def concept(worlds):
    """A concept of SD1.x whose gate stands open."""
    return worlds.concept(FAMILY, 0, "<a>", bias=-1.0)


@pytest.fixture(scope="module")
def applied(worlds, concept):
    """MODEL and CLIP with the concept and twin lock."""
    return apply_concepts(worlds.model(FAMILY), worlds.clip("sd1"), [concept], "twin")


def test_a_context_changed_by_an_attention_patch_is_gated_as_the_prompt_token_by_token(
    worlds, concept, applied
):
    patched, clip = applied
    prompt, twin = untwined(worlds.encode(clip, PROMPT)[0][0])
    gates = twin_gates(prompt, twin, [concept.twin_direction()])
    layer = cross_attentions(patched.model)[0]
    seen = []

    def half(n, context, value, extra_options):
        found = n, context * 0.5, value * 0.5
        if not seen:
            with torch.inference_mode():
                wide = found[2][extra_options["cond_or_uncond"].index(0)][None]
                seen.append((wide, layer.to_v(found[2])))
        return found

    clone = patched.clone()
    clone.set_model_attn2_patch(half)
    worlds.sample(clone, clip, PROMPT, 1)
    ((context, found),) = seen
    torch.testing.assert_close(context, twin * 0.5, rtol=0, atol=0)
    weight, output = layer.to_v.weight, concept.o_v[layer.name]
    expected = torch.nn.functional.linear(twin_inputs(context, gates), weight) + gates * output
    assert any(torch.allclose(row, expected[0], **CLOSE) for row in found)


def test_other_tokens_in_the_prompts_place_are_refused(worlds, applied):
    patched, clip = applied
    clone = patched.clone()

    def doubled(n, context, value, extra_options):
        return n, torch.cat([context, context], 1), torch.cat([value, value], 1)

    clone.set_model_attn2_patch(doubled)
    with pytest.raises(
        RuntimeError, match=r"twin lock needs the tokens.*\(2, 77\), found \(2, 154"
    ):
        worlds.sample(clone, clip, PROMPT, 1)
    # A prompt that names no concept goes through.
    assert torch.isfinite(worlds.sample(clone, clip, "a cat", 1)).all()


def test_a_region_whose_encoding_comes_in_by_a_patch_brings_its_concept_along(
    worlds, applied, caplog
):
    patched, clip = applied
    region = worlds.encode(clip, PROMPT)[0][0]
    clone = patched.clone()

    def replaced(n, context, value, extra_options):
        other = region.repeat(len(context), 1, 1)
        return n, other, other

    clone.set_model_attn2_patch(replaced)
    with CurrentNodeContext("twin region", "7"):
        found = worlds.sample(clone, clip, "a river", 1)
    named = worlds.encode(clip, PROMPT)
    assert_close(found, worlds.sample_conds(patched, named, named, 1))
    assert "does not carry that concept" not in caplog.text


def assert_close(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, **CLOSE)


def test_a_controlnet_reads_the_everyday_word_and_nothing_is_warned_of(
    worlds, applied, monkeypatch, caplog
):
    patched, clip = applied
    control, stock = worlds.controlnet(FAMILY, 4), worlds.clip("sd1")
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    read = []
    original = type(control.control_model).forward

    def forward(self, x, hint, timesteps, context, **kwargs):
        read.append(context.clone())
        return original(self, x, hint, timesteps, context, **kwargs)

    monkeypatch.setattr(type(control.control_model), "forward", forward)
    apply = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet
    conds = worlds.encode(clip, PROMPT), worlds.encode(stock, "bad")
    with CurrentNodeContext("twin controlnet", "7"):
        worlds.sample_conds(patched, *apply(*conds, control, hint, 0.9, 0.0, 1.0), 1)
    (context,) = read
    assert type(context) is torch.Tensor
    expected = {
        tuple(worlds.encode(stock, t)[0][0].flatten().tolist()) for t in (TWIN_PROMPT, "bad")
    }
    assert {tuple(row.flatten().tolist()) for row in context} == expected
    assert not [record for record in caplog.records if record.name == "perfusion"]


def test_a_model_without_concepts_reads_the_twin(worlds, applied):
    model, (_, clip) = worlds.model(FAMILY), applied
    expected = worlds.sample(model, worlds.clip("sd1"), TWIN_PROMPT, 1)
    assert torch.equal(worlds.sample(model, clip, PROMPT, 1), expected)


def test_a_prompt_encoded_for_one_key_lock_does_for_every_other(worlds, concept, applied):
    model, stock = worlds.model(FAMILY), worlds.clip("sd1")
    twin = worlds.sample(*applied, PROMPT, 1)
    for lock in ("local", "global"):
        patched, clip = apply_concepts(model, stock, [concept], lock)
        assert torch.equal(worlds.sample(applied[0], clip, PROMPT, 1), twin)
        found = worlds.sample(patched, applied[1], PROMPT, 1)
        assert torch.equal(found, worlds.sample(patched, clip, PROMPT, 1))


def test_it_compiles_into_one_graph_with_the_same_numbers(worlds, monkeypatch):
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    torch._dynamo.reset()
    counters.clear()
    model, stock = worlds.new_model("small"), worlds.clip("sd1")
    fitting = worlds.fitting_concept(model, stock, 0, "<a>", bias=-1.0)
    patched, clip = apply_concepts(model, stock, [fitting], "twin")
    compiled = patched.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model=compiled, backend="eager", options=options)
    expected = worlds.sample(patched, clip, PROMPT)
    assert torch.equal(worlds.sample(compiled, clip, PROMPT), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # A prompt that names nothing after one that does: the base model's numbers.
    plain = worlds.sample(model, stock, "a river")
    assert torch.equal(worlds.sample(compiled, clip, "a river"), plain)
    torch._dynamo.reset()


def test_chaining_two_nodes_equals_one_with_both(worlds, concept):
    model, stock = worlds.model(FAMILY), worlds.clip("sd1")
    other = worlds.concept(FAMILY, 1, "<b>", bias=-1.0)
    text = "a <a> and a <b>"
    once = worlds.sample(*apply_concepts(model, stock, [concept, other], "twin"), text, 1)
    first, clip = apply_concepts(model, stock, [concept], "twin")
    assert torch.equal(worlds.sample(*apply_concepts(first, clip, [other], "twin"), text, 1), once)


def test_what_cannot_be_applied_with_a_key_lock_is_refused_with_the_remedy(worlds, concept):
    model, stock = worlds.model(FAMILY), worlds.clip("sd1")
    trained = dataclasses.replace(concept, twin_locked=True)
    for lock in ("local", "global"):
        with pytest.raises(ValueError, match=rf"'<a>' was trained with twin.*{lock}.*choose key_l"):
            apply_concepts(model, stock, [trained], lock)
    keys = {name: torch.zeros_like(output) for name, output in concept.o_v.items()}
    owner = dataclasses.replace(concept, o_k=keys)
    with pytest.raises(ValueError, match=r"keys of its own, which a twin key lock.*with local key"):
        apply_concepts(model, stock, [owner], "twin")
    long = dataclasses.replace(concept, superclass="a b c d e f g h")
    with pytest.raises(ValueError, match="1 to 7 sub-words"):
        apply_concepts(model, stock, [long], "twin")
    local, clip = apply_concepts(model, stock, [concept])
    other = worlds.concept(FAMILY, 1, "<b>")
    with pytest.raises(ValueError, match=r"carries concepts with local.*found twin"):
        apply_concepts(local, clip, [other], "twin")
    with pytest.raises(ValueError, match=r"text encoder serves concepts with another.*found twin"):
        apply_concepts(model, clip, [other], "twin")
    _, clip = apply_concepts(model, stock, [concept], "twin")
    with pytest.raises(ValueError, match=r"text encoder serves concepts with twin.*found another"):
        apply_concepts(model, clip, [other], "global")


def test_colliding_vectors_are_refused_with_another_placeholder_as_the_remedy(worlds, concept):
    model, stock = worlds.model(FAMILY), worlds.clip("sd1")
    like = concept.embeddings["l"]
    assert torch.equal(twin_vector("<A>", "l", like), twin_vector("<a>", "l", like))
    shouted = dataclasses.replace(concept, placeholder="<A>")
    with pytest.raises(PlaceholderError, match="under another placeholder"):
        apply_concepts(model, stock, [concept, shouted], "twin")
    # What the same vector changes, a little more of it.
    i = concept.i + 0.1 * (concept.i - concept.superclass_encoding)
    renamed = dataclasses.replace(concept, placeholder="<b>", i=i)
    with pytest.raises(ValueError, match=r"parallel.*twin lock under another placeholder"):
        apply_concepts(model, stock, [concept, renamed], "twin")


def test_the_hints_are_those_of_a_prompt_that_reads_as_its_superclass(worlds, applied, caplog):
    patched, clip = applied
    stock = worlds.clip("sd1")
    nothing = worlds.encode(stock, "")
    named = worlds.encode(clip, PROMPT)
    ((encodings, more),) = named
    cases = [
        (named, None),
        (worlds.encode(clip, TWIN_PROMPT), "no prompt says <a>"),
        (worlds.encode(stock, PROMPT), "no prompt was encoded by a text encoder that knows <a>"),
        ([[encodings.softmax(-1), more]], "so the everyday word is drawn"),
    ]
    for at, (positive, hint) in enumerate(cases):
        caplog.clear()
        with CurrentNodeContext(f"twin hints {at}", "7"):
            worlds.sample_conds(patched, positive, nothing, 1)
        said = [record.getMessage() for record in caplog.records if record.name == "perfusion"]
        assert len(said) == (0 if hint is None else 1)
        assert hint is None or hint in said[0]


def test_pairs_of_both_orders_meet_with_the_twins_first():
    prompt, twin = torch.arange(12.0).reshape(1, 4, 3), -torch.arange(12.0).reshape(1, 4, 3)
    one = with_twin(prompt, twin, frozenset({"<a>"}))
    other = within_twin(twin * 2, prompt * 2, frozenset({"<b>"}))
    for first, second in ((one, other), (other, one)):
        found = torch.cat([first, second], 1)
        assert isinstance(found, TwinEncoding)
        assert found.placeholders == {"<a>", "<b>"}
        expected = [torch.cat([untwined(each)[at] for each in (first, second)], 1) for at in (0, 1)]
        assert torch.equal(found.as_subclass(torch.Tensor), expected[1])
        for each, wanted in zip(untwined(found), expected, strict=True):
            assert torch.equal(each, wanted)
    changed = copy.deepcopy(one)
    changed += other
    assert torch.equal(untwined(changed)[0], prompt * 3)
    assert torch.equal(untwined(changed)[1], twin * 3)
