"""What the running server says of the pack's nodes."""

from __future__ import annotations

from typing import Any

import pytest

from dev.client import Client

# Ids and inputs are frozen: workflows in the world refer to them. Inputs are append-only.
INPUTS = {
    "PerfusionLoadConcept": ["concept_name"],
    "PerfusionSetGate": ["concept", "bias", "temperature", "strength"],
    "PerfusionScheduleGate": [
        "concept",
        "start_percent",
        "end_percent",
        "bias_start",
        "bias_end",
        "temperature_start",
        "temperature_end",
        "blocks",
    ],
    "PerfusionApplyConcepts": ["model", "clip", "concepts", "key_lock"],
    "PerfusionTrainConcept": [
        "model",
        "clip",
        "vae",
        "images",
        "superclass",
        "placeholder",
        "steps",
        "batch_size",
        "learning_rate",
        "embedding_learning_rate",
        "seed",
        "covariance",
        "mask",
        "options",
        "captions",
        "clip_vision",
        "key_lock",
    ],
    "PerfusionTrainingOptions": [
        "sample_every",
        "sample_prompts",
        "sample_steps",
        "sample_cfg",
        "sample_seed",
        "checkpoint_every",
        "resume",
        "precision",
        "gradient_checkpointing",
        "rows_at_once",
        "resolution",
        "flip",
        "use_alpha",
        "crop",
        "zoom_out",
        "variants",
        "mask_background",
        "mask_normalisation",
        "schedule",
        "templates",
        "train_bias",
        "train_temperature",
        "ema",
        "rate_unit",
    ],
    "PerfusionSaveConcept": ["concept", "filename_prefix", "thumbnail"],
    "PerfusionConceptInfo": ["concept"],
    "PerfusionCovariance": ["clip", "captions", "captions_file", "count", "positions"],
    "PerfusionLoadPhotos": ["folder", "longest_side"],
    "PerfusionDemoModel": [],
    "PerfusionDemoImages": ["subject", "count", "seed"],
}
OUTPUTS = {
    "PerfusionLoadConcept": ["PERFUSION_CONCEPT"],
    "PerfusionSetGate": ["PERFUSION_CONCEPT"],
    "PerfusionScheduleGate": ["PERFUSION_CONCEPT"],
    "PerfusionApplyConcepts": ["MODEL", "CLIP"],
    "PerfusionTrainConcept": ["PERFUSION_CONCEPT", "LOSS_MAP", "IMAGE", "STRING", "STRING"],
    "PerfusionTrainingOptions": ["PERFUSION_TRAINING_OPTIONS"],
    "PerfusionSaveConcept": ["PERFUSION_CONCEPT"],
    "PerfusionConceptInfo": ["STRING", "IMAGE", "STRING"],
    "PerfusionCovariance": ["PERFUSION_COVARIANCE", "STRING"],
    "PerfusionLoadPhotos": ["IMAGE", "STRING"],
    "PerfusionDemoModel": ["MODEL", "CLIP", "VAE"],
    "PerfusionDemoImages": ["IMAGE", "MASK"],
}


def inputs_of(node: dict[str, Any]) -> dict[str, Any]:
    return {**node["input"].get("required", {}), **node["input"].get("optional", {})}


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_a_node_has_its_frozen_inputs_and_outputs(client: Client, name: str) -> None:
    node = client.json(f"/object_info/{name}")[name]
    assert list(inputs_of(node))[: len(INPUTS[name])] == INPUTS[name]
    assert node["output"][: len(OUTPUTS[name])] == OUTPUTS[name]
    assert node["category"].startswith("perfusion")


def test_every_input_of_every_node_of_ours_has_a_tooltip(client: Client) -> None:
    ours = {k: v for k, v in client.json("/object_info").items() if k.startswith("Perfusion")}
    assert set(INPUTS) <= set(ours)
    for name, node in ours.items():
        for key, (_, *options) in inputs_of(node).items():
            assert options, f"{name}.{key} has no options"
            assert options[0].get("tooltip"), f"{name}.{key} has no tooltip"


def test_only_output_nodes_end_a_workflow(client: Client) -> None:
    save = client.json("/object_info/PerfusionSaveConcept")["PerfusionSaveConcept"]
    load = client.json("/object_info/PerfusionLoadConcept")["PerfusionLoadConcept"]
    assert save["output_node"]
    assert not load["output_node"]
