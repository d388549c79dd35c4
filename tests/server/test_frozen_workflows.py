"""Workflows of an earlier version are accepted by a server with today's nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.client import Client, PromptRefused

WORKFLOWS = sorted((Path(__file__).resolve().parent.parent / "frozen" / "workflows").glob("*.json"))


@pytest.fixture
def emptied(client: Client) -> Iterator[Client]:
    """Whose queue is cleared afterwards: accepted is enough here, other tests run workflows."""
    yield client
    client.json("/queue", {"clear": True})
    client.json("/interrupt", {})


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_frozen_workflow_is_accepted_as_it_was(emptied: Client, file: Path) -> None:
    prompt = json.loads(file.read_text(encoding="utf-8"))
    # A refusal is raised with all its reasons: nodes, inputs and values that are no more.
    identifier = emptied.queue(prompt)
    assert identifier


def test_a_workflow_with_a_node_that_is_no_more_would_be_refused(emptied: Client) -> None:
    prompt = json.loads(WORKFLOWS[0].read_text(encoding="utf-8"))
    loader = next(node for node in prompt.values() if node["class_type"] == "PerfusionDemoModel")
    loader["class_type"] = "PerfusionModelOfBefore"
    with pytest.raises(PromptRefused, match="not found"):
        emptied.queue(prompt)
