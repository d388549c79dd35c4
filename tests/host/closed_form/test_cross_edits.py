"""Closed-form edits on transformers with a text cross-attention: all its keys and values."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import comfy.lora
import comfy.model_management
import folder_paths
import pytest
import torch
from comfyui_perfusion.host.models.editable import edited_as
from comfyui_perfusion.host.models.families import UnsupportedModelError, cross_attentions
from comfyui_perfusion.host.models.networks import FusedPart
from comfyui_perfusion.nodes.debias import PerfusionDebias
from comfyui_perfusion.nodes.erase_concepts import PerfusionEraseConcepts
from comfyui_perfusion.nodes.preserve import PerfusionPreserve
from comfyui_perfusion.nodes.save_edit import PerfusionSaveEdit
from comfyui_perfusion.perfusion.closed_form.matching import match_in_order, words_of

from tests.host.closed_form.cross_edits import (
    ACTED_ON,
    DESTINATION,
    PREFIX,
    SOLVING,
    SOURCE,
    assume,
    close_to,
    formula,
    weights_of,
)
from tests.host.cross_models import build_cross, family_row, full_size, real_families


@functools.cache
def stock_nodes():
    """ComfyUI's own nodes; under the name `nodes` there are ours."""
    file = Path(folder_paths.base_path) / "nodes.py"
    spec = importlib.util.spec_from_file_location("comfyui_nodes", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_lora(model, file):
    """What the stock LoraLoaderModelOnly makes of a MODEL."""
    return stock_nodes().LoraLoaderModelOnly().load_lora_model_only(model, file.name, 1.0)[0]


def changed_keys(first, second):
    a, b = weights_of(first), weights_of(second)
    return {key for key in a if not torch.equal(a[key], b[key])}


def test_the_edit_is_the_closed_formula_on_every_key_and_value(small):
    edited, report = assume(small)
    source, destination = small.encode([SOURCE, DESTINATION])
    matched = match_in_order(source, destination)[: source.end]
    inputs = next(iter(small.given(SOURCE).values()))[: source.end]
    targets = next(iter(small.given(DESTINATION).values()))[matched]
    old, new = weights_of(small.model), weights_of(edited)
    assert {key for key in old if not torch.equal(old[key], new[key])} == set(small.edited_keys())
    assert f"{len(small.edited_keys())} projections edited" in report
    asked = (inputs != targets).any(1)
    for key in small.edited_keys():
        change = formula(old[key], inputs, targets)
        close_to(new[key] - old[key], change)
        # The outputs have moved where they should, whatever is added to them.
        wanted = (targets - inputs)[asked] @ old[key].mT
        off = wanted - inputs[asked] @ (new[key] - old[key]).mT
        assert float(off.norm()) < 0.1 * float(wanted.norm()), key


def test_what_is_preserved_drifts_as_little_as_is_reported(small):
    texts = ["a small cat in a garden", "the snow"]
    (kept,) = PerfusionPreserve.execute(small.clip, "\n".join(texts), 100.0).args
    free, _ = assume(small)
    held, report = assume(small, preserve=kept)
    stated = float(re.search(r"drift of what is preserved: (\S+)", report).group(1))
    rows = torch.cat([each.encodings[each.first :] for each in small.encode(texts)])
    old = weights_of(small.model)
    drifts = {}
    for name, model in (("held", held), ("free", free)):
        new = weights_of(model)
        drifts[name] = sorted(
            float((rows @ (new[key] - old[key]).mT).norm() / (rows @ old[key].mT).norm())
            for key in small.edited_keys()
        )
    middle = len(drifts["held"]) // 2
    assert drifts["held"][-1] < 0.5 * drifts["free"][0]
    # The report looks at every so many of the tokens.
    assert drifts["held"][middle] == pytest.approx(stated, rel=0.5, abs=1e-4)


def test_a_model_is_what_it_was_when_the_edit_is_unloaded(small):
    before = {key: value.clone() for key, value in small.model.model.state_dict().items()}
    plain = small.sample(small.model)
    edited, _ = assume(small, with_padding=True)
    assert not torch.equal(small.sample(edited), plain)
    assert torch.equal(small.sample(small.model), plain)
    comfy.model_management.unload_all_models()
    after = small.model.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(small.sample(assume(small, strength=0.0)[0]), plain)


@pytest.mark.parametrize(("rank", "allowed"), [(0, 1e-3), (1, None)])
def test_a_saved_edit_loaded_by_the_stock_node_is_the_edit(small, loras, rank, allowed):
    edited, _ = assume(small, with_padding=True, strength=0.8)
    (text,) = PerfusionSaveEdit.execute(edited, "edit", rank, "fp32").ui.as_dict()["text"]
    error = float(text.rsplit(" ", 1)[1])
    (file,) = loras.glob("*.safetensors")
    fresh = build_cross(small.name)
    found_model = load_lora(fresh, file)
    old, wanted, found = (weights_of(each) for each in (fresh, edited, found_model))
    assert {key for key in old if not torch.equal(old[key], found[key])} == set(small.edited_keys())
    errors = [
        float((found[key] - wanted[key]).norm() / (wanted[key] - old[key]).norm())
        for key in small.edited_keys()
    ]
    if allowed is None:
        assert max(errors) == pytest.approx(error, rel=0.02)
        return
    assert max(errors) < allowed
    plain, drawn, drawn_by_lora = (small.sample(each) for each in (fresh, edited, found_model))
    far = float((drawn - plain).norm())
    assert far > 1e-3 * float(plain.norm())
    assert float((drawn_by_lora - drawn).norm()) < allowed * far


@pytest.mark.parametrize("name", ACTED_ON)
def test_every_key_and_value_of_the_published_model_has_a_name_in_lora_files(name):
    with real_families():
        model = full_size(name)
        family = edited_as(model)
        assert family.name == name
        layers = cross_attentions(model)
        assert len({layer.input_width for layer in layers}) == 1
        known = set(comfy.lora.model_lora_keys_unet(model, {}).values())
        for layer in layers:
            for part in family.network.projections:
                assert f"{PREFIX}{layer.name}.{part}.weight" in known


def test_hunyuan_dit_is_refused_by_name_with_what_works_on_it(smalls):
    with pytest.raises(UnsupportedModelError, match=r"^HunyuanDiT cannot be edited.*Train Concept"):
        edited_as(smalls("hunyuan_dit").model.model)


def test_values_alone_leave_the_keys_as_they_are(small):
    edited, report = assume(small, with_to_k=False)
    layers = cross_attentions(small.model.model)
    assert f"{len(layers)} projections edited" in report
    both, _ = assume(small)
    old, new, full = (weights_of(each) for each in (small.model, edited, both))
    *_, values = family_row(small.name).network.projections
    wanted = {f"{PREFIX}{layer.name}.{values}.weight" for layer in layers}
    assert {key for key in old if not torch.equal(old[key], new[key])} == wanted
    for layer in layers:
        key = f"{PREFIX}{layer.name}.{values}.weight"
        first = layer.to_v.start if isinstance(layer.to_v, FusedPart) else 0
        assert torch.equal(new[key][:first], old[key][:first])
        close_to(new[key][first:] - old[key][first:], (full[key] - old[key])[first:])


def test_chosen_layers_alone_can_be_edited(small):
    edited, _ = assume(small, layers="blocks.1.")
    assert changed_keys(small.model, edited) == {
        key for key in small.edited_keys() if "blocks.1." in key
    }
    with pytest.raises(ValueError, match="name contains 'middle_block', so nothing would be"):
        assume(small, layers="middle_block")


@pytest.mark.parametrize("method", ["replacement", "refinement"])
def test_erasing_asks_it_of_the_word_itself_or_of_the_words_around_it(small, method):
    edited, _ = PerfusionEraseConcepts.execute(
        *(small.model, small.clip, "mug -> cup", method, "a {} on a table"),
        **{**SOLVING, "ridge": 1e-4},
    ).args
    prompts = small.encode(["a mug on a table", "a cup on a table"])
    words = [words_of(prompt)[1] for prompt in prompts]
    assert [word.text for word in words] == ["mug", "cup"]
    if method == "replacement":
        places = [word.stop - 1 for word in words]
    else:
        places = [word.start - 1 for word in words]
    given, wanted = (each.encodings[at] for each, at in zip(prompts, places, strict=True))
    old, new = weights_of(small.model), weights_of(edited)
    for key in small.edited_keys():
        off = float((new[key] @ given - old[key] @ wanted).norm())
        assert off < 0.05 * float((old[key] @ (given - wanted)).norm()), key


def test_debiasing_pushes_the_word_towards_what_is_missing(small):
    settings = {"measured": "0.9, 0.1", "wanted": "", "step": 1.0, **SOLVING}
    edited, _ = PerfusionDebias.execute(
        small.model, small.clip, "mug", "old\nblue", **{**settings, "ridge": 1e-4}
    ).args
    words = small.encode(["mug", "old", "blue"])
    mug, old_word, blue = (each.encodings[each.last_word] for each in words)
    old, new = weights_of(small.model), weights_of(edited)
    for key in small.edited_keys():
        wanted = old[key] @ (0.4 * (blue - old_word))
        found = (new[key] - old[key]) @ mug
        assert float((found - wanted).norm()) < 0.02 * float(wanted.norm()), key
