"""Closed-form edits on transformers with a text cross-attention: every key and value of the text.

What the edits are solved for is taken from the running model: hooks on its projections tell what
they are given.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.sample
import folder_paths
import pytest
import torch
from comfy import model_patcher
from comfy.quant_ops import QuantizedTensor
from comfyui_perfusion.host.closed_form.edits import preserve_prompts
from comfyui_perfusion.host.closed_form.readings import text_side
from comfyui_perfusion.host.models.editable import EDITED, edited_as
from comfyui_perfusion.host.models.families import UnsupportedModelError, cross_attentions
from comfyui_perfusion.host.models.networks import FusedPart
from comfyui_perfusion.host.text.covariance import measure_covariance
from comfyui_perfusion.nodes.debias import PerfusionDebias
from comfyui_perfusion.nodes.edit_assumption import PerfusionEditAssumption
from comfyui_perfusion.nodes.erase_concepts import PerfusionEraseConcepts
from comfyui_perfusion.nodes.preserve import PerfusionPreserve
from comfyui_perfusion.nodes.save_edit import PerfusionSaveEdit
from comfyui_perfusion.perfusion.closed_form.matching import match_in_order, words_of

from tests.host.cross_models import (
    CPU,
    CROSS,
    build_cross,
    family_row,
    full_size,
    narrow_families,
    real_families,
)
from tests.host.injection.weight_formats import quantised_state

RIDGE = 1e-2
SOLVING = {"ridge": RIDGE, "with_to_k": True, "strength": 1.0, "layers": "", "restart": False}
SOURCE, DESTINATION = "a mug on a table", "an old mug on a table"
PREFIX = "diffusion_model."
# Sums of some thousand products in fp32, relative to the largest value.
CLOSE = 2e-4
# What every encoding passes in the model before the projections read it, and what is patched of it.
BETWEEN = {
    "anima": "llm_adapter.out_proj",
    "wan": "text_embedding.0",
    "pixart_sigma": "y_embedder.y_proj.fc1",
    "pixart_alpha": "y_embedder.y_proj.fc1",
    "ltxv": "caption_projection.linear_2",
}


# HunyuanDiT's maps read two encodings of different widths.
ACTED_ON = [name for name in CROSS if family_row(name).network in EDITED]


class Small:
    """A family's small MODEL and CLIP."""

    def __init__(self, name):
        self.name = name
        self.row = CROSS[name]
        self.model, self.clip = build_cross(name), self.row.clip()

    def sample(self, model, prompt=SOURCE):
        with torch.inference_mode():
            both = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))] * 2
            latent = torch.zeros(self.row.latent)
            noise = comfy.sample.prepare_noise(latent, 0)
            return comfy.sample.sample(
                *(model, noise, 1, 1.0, "euler", "simple", *both, latent), disable_pbar=True, seed=0
            )

    def given(self, prompt, model=None):
        """Path -> what each projection is given while a prompt is sampled (N, D)."""
        model = model or self.model
        seen, hooks = {}, []
        for layer in cross_attentions(model.model):
            for at, module in enumerate(layer.modules):

                def note(_module, inputs, _output, path=(layer.name, at)):
                    seen[path] = inputs[0][0].detach().float().clone()

                hooks.append(module.register_forward_hook(note))
        try:
            self.sample(model, prompt)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def encode(self, prompts, model=None):
        (reading,) = text_side(model or self.model, self.clip, "", True).readings
        return reading.encoders[0](prompts)

    def edited_keys(self):
        """The weights of all keys and values."""
        return [
            f"{PREFIX}{layer.name}.{part}.weight"
            for layer in cross_attentions(self.model.model)
            for part in family_row(self.name).network.projections
        ]


@pytest.fixture(scope="module", autouse=True)
def _narrow():
    with narrow_families():
        yield


@pytest.fixture(scope="module")
def smalls():
    """Each family's small models, built once."""
    return functools.cache(Small)


@pytest.fixture(params=ACTED_ON)
def small(request, smalls):
    return smalls(request.param)


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """An empty models/loras."""
    _, extensions = folder_paths.folder_names_and_paths["loras"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], extensions))
    return tmp_path


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


def assume(small, model=None, **changes):
    settings = {"augment": False, "with_padding": False, **SOLVING, **changes}
    return PerfusionEditAssumption.execute(
        model or small.model, small.clip, SOURCE, DESTINATION, **settings
    ).args


def weights_of(model):
    """All weights of a MODEL as ComfyUI computes them when it loads it."""
    comfy.model_management.unload_all_models()
    return {
        key: model.patch_weight_to_device(key, return_weight=True).float().clone()
        for key in model.model.state_dict()
        if key.startswith(PREFIX)
    }


def changed_keys(first, second):
    a, b = weights_of(first), weights_of(second)
    return {key for key in a if not torch.equal(a[key], b[key])}


def close_to(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=CLOSE)


def formula(weight, inputs, targets, ridge=RIDGE):
    """dW of the paper's normal equations, in fp64."""
    weight, inputs, targets = weight.double(), inputs.double(), targets.double()
    system = inputs.mT @ inputs + ridge * torch.eye(inputs.shape[1], dtype=torch.float64)
    wanted = (targets - inputs) @ weight.mT
    return torch.linalg.solve(system, inputs.mT @ wanted).mT.float()


def patched_between(small):
    """The same MODEL with a patch on what encodings pass in it."""
    model = small.model.clone()
    if small.name in BETWEEN:
        key = f"{PREFIX}{BETWEEN[small.name]}.weight"
        shape = small.model.model.state_dict()[key].shape
        change = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(5)) / shape[1]
        model.add_patches({key: ("diff", (change * shape[1] ** 0.5,))})
    return model


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "with a LoRA on what is between"])
def test_encodings_are_what_all_projections_are_given(small, patched):
    model = patched_between(small) if patched else small.model
    seen = small.given(SOURCE, model)
    assert len(seen) == sum(len(layer.modules) for layer in cross_attentions(model.model))
    first = next(iter(seen.values()))
    assert all(torch.equal(rows, first) for rows in seen.values())
    (prompt,) = small.encode([SOURCE], model)
    count = len(prompt.tokens)
    assert [word.text for word in words_of(prompt)] == SOURCE.split()
    close_to(prompt.encodings, first[:count])
    if small.name == "anima":
        # Behind the T5 tokens the adapter's output is filled up with zeros, which say nothing.
        assert not bool(first[count:].any())
    elif small.name != "ltxv":
        assert count == len(first)
    if patched and small.name in BETWEEN:
        (plain,) = small.encode([SOURCE])
        assert not torch.allclose(plain.encodings, prompt.encodings, atol=1e-2)


def test_tokens_that_a_model_does_not_look_at_are_left_out(smalls):
    small = smalls("ltxv")
    source, destination = small.encode([SOURCE, DESTINATION])
    assert len(source.tokens) == source.end + 1
    assert len(match_in_order(source, destination)) == len(source.tokens)
    # The others are there, and what they hold changes nothing.
    assert len(next(iter(small.given(SOURCE).values()))) > len(source.tokens)


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


def test_each_of_two_experts_is_edited_for_what_its_own_layers_read(smalls):
    low, high = smalls("wan"), build_cross("wan", seed=7)
    first, second = low.encode([SOURCE])[0], low.encode([SOURCE], high)[0]
    assert first.tokens == second.tokens
    assert not torch.allclose(first.encodings, second.encodings, atol=1e-2)
    edited, _ = assume(low, high)
    source, destination = low.encode([SOURCE, DESTINATION], high)
    matched = match_in_order(source, destination)[: source.end]
    old, new = weights_of(high), weights_of(edited)
    for key in low.edited_keys():
        change = formula(old[key], source.encodings[: source.end], destination.encodings[matched])
        close_to(new[key] - old[key], change)


def test_what_a_quantised_network_makes_of_encodings_is_what_its_weights_mean(smalls):
    small, plain = smalls("wan"), build_cross("wan")
    network = plain.model.diffusion_model
    stored, meant = quantised_state(network.state_dict(), "float8_e4m3fn", "text_embedding")
    network.load_state_dict(meant)
    config = small.row.config(dict(small.row.unet))
    config.quant_config = {"mixed_ops": True}
    config.set_inference_dtype(torch.float32, torch.float32)
    with torch.inference_mode():
        base = small.row.base(config, device=CPU)
        base.diffusion_model.load_state_dict(stored, strict=False)
    assert isinstance(base.diffusion_model.text_embedding[0].weight, QuantizedTensor)
    quantised = model_patcher.CoreModelPatcher(base, load_device=CPU, offload_device=CPU)
    (found,), (expected,) = (small.encode([SOURCE], model) for model in (quantised, plain))
    close_to(found.encodings, expected.encodings)
    (rounded,) = small.encode([SOURCE])
    assert not torch.allclose(rounded.encodings, expected.encodings, atol=1e-3)


def test_statistics_are_preserved_where_they_are_of_what_the_layers_read(small):
    entry = family_row(small.name).network.entry
    adapts = family_row(small.name).network.adapts
    captions = ["a small cat in a garden", "an old bag", "the white snow"]
    model = small.model if adapts else None
    statistics = measure_covariance(small.clip, captions, model=model)
    kept = preserve_prompts(small.clip, (), 1.0, statistics, 3e4)
    if entry is not None:
        with pytest.raises(ValueError, match=rf"sends that through `{entry}` before"):
            assume(small, preserve=kept)
        return
    rows = torch.cat([each.encodings[: each.end] for each in small.encode(captions)])
    old = weights_of(small.model)

    def drift(edited):
        new = weights_of(edited)
        return sum(float((rows @ (new[key] - old[key]).mT).norm()) for key in small.edited_keys())

    assert drift(assume(small, preserve=kept)[0]) < 0.5 * drift(assume(small)[0])


def test_the_clip_of_another_family_is_refused_with_both_named(small, smalls):
    other = smalls("wan" if small.name != "wan" else "ltxv")
    with pytest.raises(UnsupportedModelError, match=r"does not belong to .*expected the text enc"):
        PerfusionEditAssumption.execute(
            *(small.model, other.clip, SOURCE, DESTINATION),
            **{"augment": False, "with_padding": False, **SOLVING},
        )
