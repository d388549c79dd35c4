"""The templates for one's own photos, with a checkpoint file and photos as files."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dev.client import Client
from dev.server import Server
from tests.real_models import SDXL, TRAIN, TRAIN_SDXL, USE, prepare, read, small, train_once

REAL = (TRAIN, TRAIN_SDXL, USE)


def inputs_of(name: str, kind: str) -> dict[str, Any]:
    return next(n["inputs"] for n in read(name).values() if n["class_type"] == kind)


@pytest.fixture
def server(comfy_server: Server) -> Server:
    prepare(comfy_server)
    return comfy_server


def test_photos_are_learned_from_a_checkpoint_file_and_the_concept_is_used(
    client: Client, server: Server
) -> None:
    train_once(server)
    concept = server.base / "models" / "perfusion" / "my_cat_00001_.safetensors"
    assert 0 < concept.stat().st_size < 100_000
    run = client.run(small(read(USE)))
    assert run.status == "execution_success", run.error
    assert len(run.images("output")) == 1


def test_the_sdxl_page_is_accepted_by_the_server(client: Client, server: Server) -> None:
    # Accepted, that is every input is valid; the empty file is then refused by the loader.
    run = client.run(read(TRAIN_SDXL))
    assert run.status == "execution_error"
    assert run.error.startswith("CheckpointLoaderSimple")
    assert SDXL in json.dumps(read(TRAIN_SDXL))


@pytest.mark.parametrize("name", REAL)
def test_nothing_of_the_small_world_is_left_on_a_page_for_real_checkpoints(name: str) -> None:
    kinds = {node["class_type"] for node in read(name).values()}
    assert not {kind for kind in kinds if kind.startswith("PerfusionDemo")}
    assert "ImageScaleBy" not in kinds
    size = 1024 if name == TRAIN_SDXL else 512
    latent = inputs_of(name, "EmptyLatentImage")
    assert (latent["width"], latent["height"]) == (size, size)
    assert inputs_of(name, "KSampler")["cfg"] >= 5


@pytest.mark.parametrize("name", [TRAIN, TRAIN_SDXL])
def test_a_training_page_for_real_checkpoints_has_the_rates_that_the_node_suggests(
    client: Client, name: str
) -> None:
    kind = "PerfusionTrainConcept"
    suggested = client.json(f"/object_info/{kind}")[kind]["input"]["required"]
    inputs = inputs_of(name, kind)
    for rate in ("learning_rate", "embedding_learning_rate"):
        assert inputs[rate] == suggested[rate][1]["default"]
