"""Bad input reaches the person as a message that names what is wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dev.client import Client, PromptRefused
from dev.server import Server

API = Path(__file__).resolve().parent.parent.parent / "workflows" / "api"


@pytest.fixture
def training() -> dict[str, Any]:
    """The training workflow up to the saved concept, with few steps."""
    prompt = json.loads((API / "01 train a concept.json").read_text(encoding="utf-8"))
    kept = {k: v for k, v in prompt.items() if v["class_type"].startswith("Perfusion")}
    train = next(v for v in kept.values() if v["class_type"] == "PerfusionTrainConcept")
    train["inputs"]["steps"] = 2
    return kept


@pytest.fixture
def using() -> dict[str, Any]:
    return json.loads((API / "02 use a concept.json").read_text(encoding="utf-8"))


def change(prompt: dict[str, Any], kind: str, **inputs: Any) -> dict[str, Any]:
    changed = copy.deepcopy(prompt)
    for node in changed.values():
        if node["class_type"] == kind:
            node["inputs"].update(inputs)
    return changed


def refused(client: Client, prompt: dict[str, Any]) -> str:
    """The reason why a workflow does not start or does not finish."""
    try:
        run = client.run(prompt)
    except PromptRefused as refusal:
        return str(refusal)
    assert run.status == "execution_error", "the workflow should not have succeeded"
    return run.error


def test_a_concept_that_is_not_there_is_named(client: Client, using: dict[str, Any]) -> None:
    prompt = change(using, "PerfusionLoadConcept", concept_name="nothing.safetensors")
    assert "nothing.safetensors" in refused(client, prompt)


def test_an_empty_superclass_is_refused(client: Client, training: dict[str, Any]) -> None:
    reason = refused(client, change(training, "PerfusionTrainConcept", superclass="  "))
    assert "superclass" in reason


def test_a_placeholder_of_two_words_is_refused(client: Client, training: dict[str, Any]) -> None:
    reason = refused(client, change(training, "PerfusionTrainConcept", placeholder="my cat"))
    assert "placeholder" in reason
    assert "my cat" in reason


def test_zero_steps_are_refused_before_anything_runs(
    client: Client, training: dict[str, Any]
) -> None:
    reason = refused(client, change(training, "PerfusionTrainConcept", steps=0))
    assert "steps" in reason


def test_a_concept_file_cut_short_is_named(
    client: Client, comfy_server: Server, using: dict[str, Any]
) -> None:
    folder = comfy_server.base / "models" / "perfusion"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cut_short.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    prompt = change(using, "PerfusionLoadConcept", concept_name="cut_short.safetensors")
    assert "cut_short.safetensors" in refused(client, prompt)


def test_a_concept_of_another_family_names_both(
    client: Client, comfy_server: Server, using: dict[str, Any]
) -> None:
    folder = comfy_server.base / "models" / "perfusion"
    write_sd1_concept(folder / "for_sd1.safetensors")
    prompt = change(using, "PerfusionLoadConcept", concept_name="for_sd1.safetensors")
    reason = refused(client, prompt)
    assert "Stable Diffusion 1.x" in reason
    assert "small world" in reason
    # A failed run leaves the server as usable as before.
    assert client.run(using).status == "execution_success"


def write_sd1_concept(path: Path) -> None:
    import torch

    from perfusion.concept.concept import Concept
    from perfusion.concept.concept_file import save_concept

    path.parent.mkdir(parents=True, exist_ok=True)
    wide = torch.ones(768)
    concept = Concept(
        family="sd1",
        placeholder="<other>",
        superclass="cat",
        embeddings={"l": wide},
        i=wide,
        u=wide / 768,
        superclass_encoding=wide,
        o_v={"input_blocks.1.1.transformer_blocks.0.attn2": torch.ones(320)},
    )
    save_concept(concept, path)


@pytest.mark.parametrize("prefix", ["../outside", "", "  ", "things/", "/tmp/thing"])
def test_a_name_that_cannot_be_saved_is_refused_before_training(
    client: Client, training: dict[str, Any], prefix: str
) -> None:
    prompt = change(training, "PerfusionSaveConcept", filename_prefix=prefix)
    # Refused when handed in, that is before anything runs.
    with pytest.raises(PromptRefused, match="filename_prefix"):
        client.queue(prompt)


def test_a_concept_newer_than_the_menu_is_accepted(
    client: Client, comfy_server: Server, using: dict[str, Any]
) -> None:
    client.json("/object_info/PerfusionLoadConcept")
    shipped = API.parent.parent / "demo" / "concepts" / "bo.safetensors"
    copied = comfy_server.base / "models" / "perfusion" / "newer.safetensors"
    copied.parent.mkdir(parents=True, exist_ok=True)
    copied.write_bytes(shipped.read_bytes())
    run = client.run(change(using, "PerfusionLoadConcept", concept_name="newer.safetensors"))
    assert run.status == "execution_success", run.error
