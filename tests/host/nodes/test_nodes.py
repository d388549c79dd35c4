"""The nodes as ComfyUI calls them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import comfy.model_management
import comfyui_perfusion
import folder_paths
import pytest
import torch
from comfy_extras.nodes_train import LossGraphNode
from comfyui_perfusion.host.text import covariance as covariance_module
from comfyui_perfusion.host.text.caption_sources import built_in
from comfyui_perfusion.host.training.options import TrainingOptions
from comfyui_perfusion.nodes.concepts import (
    PerfusionApplyConcepts,
    PerfusionLoadConcept,
    PerfusionSaveConcept,
    PerfusionSetGate,
)
from comfyui_perfusion.nodes.training import PerfusionCovariance, PerfusionTrainConcept
from comfyui_perfusion.perfusion import FileFormatError, load_concept

SNAPSHOT = Path(__file__).with_name("schema_snapshot.json")


def node_classes():
    extension = asyncio.run(comfyui_perfusion.comfy_entrypoint())
    return asyncio.run(extension.get_node_list())


def schema_of(node):
    """What a saved workflow depends on."""
    schema = node.GET_SCHEMA()
    return {
        "inputs": [[each.id, each.get_io_type(), bool(each.optional)] for each in schema.inputs],
        "outputs": [each.get_io_type() for each in schema.outputs],
        "output_node": schema.is_output_node,
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/perfusion."""
    _, extensions = folder_paths.folder_names_and_paths["perfusion"]
    entry = ([str(tmp_path)], extensions)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "perfusion", entry)
    folder_paths.filename_list_cache.pop("perfusion", None)
    yield tmp_path
    folder_paths.filename_list_cache.pop("perfusion", None)


@pytest.fixture(scope="module")
def world(worlds):
    """Inputs of the training node: a small model and three pictures."""
    return {
        "model": worlds.new_model("small"),
        "clip": worlds.clip("sd1"),
        "vae": worlds.vae(),
        "images": torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0)),
    }


@pytest.fixture(scope="module")
def covariance(world):
    """Statistics of the training node's text encoder."""
    captions = "\n".join(f"a {word} number {at}" for at in range(10) for word in ("cat", "dog"))
    return PerfusionCovariance.execute(world["clip"], captions).args[0]


def train(world, covariance, **changes):
    settings = {
        "superclass": "cat",
        "placeholder": "<thing>",
        "steps": 3,
        "batch_size": 2,
        "learning_rate": 0.03,
        "embedding_learning_rate": 0.006,
        "seed": 5,
        "covariance": covariance,
        "options": TrainingOptions(sample_every=0),
    }
    given = {**world, **settings, **changes}
    # As ComfyUI calls a node that takes lists.
    lists = {name: [value] for name, value in given.items() if value is not None}
    with torch.inference_mode():
        return PerfusionTrainConcept.execute(**lists).args


def test_ids_inputs_and_outputs_are_frozen():
    """Inputs may be appended; to accept that, extend the snapshot by hand."""
    assert {node.GET_SCHEMA().node_id: schema_of(node) for node in node_classes()} == json.loads(
        SNAPSHOT.read_text()
    )


def test_every_input_and_output_has_a_tooltip_and_every_node_its_category():
    for node in node_classes():
        schema = node.GET_SCHEMA()
        assert schema.category.split("/")[0] == "perfusion"
        assert schema.description
        for each in (*schema.inputs, *schema.outputs):
            assert each.tooltip, f"{schema.node_id}.{each.id}"


def test_a_concept_is_trained_saved_listed_loaded_and_applied(worlds, world, covariance, folder):
    concept, losses, *_ = train(world, covariance)
    assert len(losses["loss"]) == 3
    assert concept.family == "sd1"
    assert concept.placeholder == "<thing>"
    output = PerfusionSaveConcept.execute(concept, "mine/my_cat")
    file = folder / "mine" / "my_cat_00001_.safetensors"
    assert output.args == (concept,)
    (text,) = output.ui.as_dict()["text"]
    assert "mine/my_cat_00001_.safetensors" in text
    assert f"{file.stat().st_size / 1000:.1f} kB" in text
    PerfusionSaveConcept.execute(concept, "mine/my_cat")
    (options,) = (each.options for each in PerfusionLoadConcept.define_schema().inputs)
    saved = sorted(name for name in options if name.startswith("mine/"))
    assert saved == [f"mine/my_cat_{n:05}_.safetensors" for n in (1, 2)]
    (loaded,) = PerfusionLoadConcept.execute(saved[0]).args
    (gated,) = PerfusionSetGate.execute(loaded, 0.3, 0.2, 0.9).args
    assert (gated.gate.bias, gated.gate.temperature, gated.gate.strength) == (0.3, 0.2, 0.9)
    model, clip = PerfusionApplyConcepts.execute(
        world["model"], world["clip"], {"concept0": gated, "concept1": None}
    ).args
    found = worlds.sample(model, clip, "a <thing>")
    assert torch.isfinite(found).all()
    assert not torch.equal(found, worlds.sample(world["model"], clip, "a <thing>"))


def test_the_core_loss_graph_takes_the_losses(world, covariance, monkeypatch):
    _, losses, *_ = train(world, covariance)
    drawn = []
    monkeypatch.setattr(
        "comfy_extras.nodes_train.ui.PreviewImage", lambda image, cls: drawn.append(image) or None
    )
    LossGraphNode.execute(losses, "loss")
    assert drawn[0].shape[-1] == 3


def test_the_same_seed_trains_the_same_concept(world, covariance):
    first, second, other = (train(world, covariance, seed=seed)[0] for seed in (1, 1, 2))
    name = next(iter(first.o_v))
    assert torch.equal(first.o_v[name], second.o_v[name])
    assert torch.equal(first.embeddings["l"], second.embeddings["l"])
    assert not torch.equal(first.o_v[name], other.o_v[name])


def test_an_interrupt_keeps_what_was_learned_and_restores_the_model(
    worlds, world, covariance, folder, monkeypatch
):
    before = worlds.state(world["model"])
    seen = []

    def stop_at_two(self, value, total=None, preview=None):
        seen.append((value, total))
        if value == 2:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr("comfy.utils.ProgressBar.update_absolute", stop_at_two)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(world, covariance, steps=50)
    assert seen == [(1, 50), (2, 50)]
    (file,) = folder.glob("runs/thing-*/*.safetensors")
    assert file.name == "step_00002.safetensors"
    assert json.loads(load_concept(file).metadata["training"])["steps"] == 2
    assert worlds.same(worlds.state(world["model"]), before)
    assert not comfy.model_management.in_training


def test_nan_stops_training_saves_the_last_good_state_and_says_so(world, covariance, folder):
    with pytest.raises(ValueError, match=r"stopped after \d+ good steps.*learning rate"):
        train(world, covariance, learning_rate=1e30, steps=50)
    (file,) = folder.glob("runs/thing-*/*.safetensors")
    assert all(torch.isfinite(output).all() for output in load_concept(file).o_v.values())


def test_a_model_that_only_gives_nan_is_reported_at_the_first_step(worlds, world, covariance):
    broken = worlds.new_model("small", seed=1)
    with torch.no_grad():
        broken.model.diffusion_model.out[2].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="after 0 good steps: step 1: its loss is nan"):
        train({**world, "model": broken}, covariance)


def test_a_covariance_of_another_encoder_is_refused(worlds, world):
    other, _ = PerfusionCovariance.execute(worlds.new_clip("sd1", seed=8), "a cat").args
    with pytest.raises(ValueError, match="measure it again with this model"):
        train(world, other)


def test_without_a_covariance_it_is_measured_first_and_found_the_next_time(world, monkeypatch):
    measured = []
    original = covariance_module.measure_covariance

    def counted(*args):
        measured.append(args)
        return original(*args)

    monkeypatch.setattr(covariance_module, "measure_covariance", counted)
    monkeypatch.setattr(
        "comfyui_perfusion.host.text.caption_sources.built_in", lambda count: built_in(40)
    )
    first, *_ = train(world, None, steps=1)
    second, *_ = train(world, None, steps=1)
    assert len(measured) == 1
    assert first.metadata["covariance_hash"] == second.metadata["covariance_hash"]
    assert torch.equal(first.u, second.u)


def test_bad_pictures_are_refused_before_anything_is_measured(world, monkeypatch):
    monkeypatch.setattr(
        "comfyui_perfusion.host.training.train.covariance_of",
        lambda *_: pytest.fail("measured before the pictures were checked"),
    )
    with pytest.raises(ValueError, match="at least one training image"):
        train({**world, "images": torch.rand(0, 32, 32, 3)}, None)


@pytest.mark.parametrize("prefix", ["../outside", "/tmp/outside", "a/../../outside", "", "."])
def test_a_prefix_outside_the_concept_folder_is_refused(worlds, folder, prefix):
    with pytest.raises(ValueError, match="expected a name inside"):
        PerfusionSaveConcept.execute(worlds.concept("sd1"), prefix)
    assert not any(folder.iterdir())


@pytest.mark.parametrize("name", ["../../secret.safetensors", "missing.safetensors", "x.ckpt"])
def test_a_name_outside_the_concept_folder_is_not_loaded(folder, name):
    (folder / "x.ckpt").write_bytes(b"")
    (folder.parent / "secret.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="there is no concept file"):
        PerfusionLoadConcept.execute(name)


def test_a_file_that_is_no_concept_is_named_in_the_error(folder):
    (folder / "odd.safetensors").write_bytes(b"no safetensors at all")
    with pytest.raises(FileFormatError, match=r"odd\.safetensors"):
        PerfusionLoadConcept.execute("odd.safetensors")


def test_a_changed_file_is_loaded_again(worlds, folder):
    PerfusionSaveConcept.execute(worlds.concept("sd1"), "a")
    name = "a_00001_.safetensors"
    before = PerfusionLoadConcept.fingerprint_inputs(name)
    assert PerfusionLoadConcept.fingerprint_inputs(name) == before
    file = folder / name
    file.write_bytes(file.read_bytes() + b" ")
    assert PerfusionLoadConcept.fingerprint_inputs(name) != before
