"""What a node says about its work stands on the node."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Page

WORKFLOW = {
    "1": {"class_type": "PerfusionLoadConcept", "inputs": {"concept_name": "bo.safetensors"}},
    "2": {"class_type": "PerfusionConceptInfo", "inputs": {"concept": ["1", 0]}},
}
SHOWN = """() => [...document.querySelectorAll('textarea')]
    .map(area => [area.value, area.readOnly, area.offsetHeight])
    .filter(([text]) => text.startsWith('trigger phrase'))"""
PICTURES = """() => window.app.graph.nodes
    .find(node => node.type === 'PerfusionConceptInfo').imgs?.length"""
SAVED = "() => window.app.graph.serialize().nodes.map(node => node.widgets_values ?? [])"
GRAPH = "async () => (await window.app.graphToPrompt()).output"


def test_text_and_picture_of_a_concept_stand_on_its_node_and_not_in_the_workflow(
    page: Page, complaints: Any
) -> None:
    titled = {key: {**node, "_meta": {"title": key}} for key, node in WORKFLOW.items()}
    page.evaluate("async graph => { await window.app.loadApiJson(graph, 'info') }", titled)
    page.get_by_test_id("queue-button").click()
    page.wait_for_function(f"({SHOWN})().length > 0", timeout=60_000)
    ((text, read_only, height),) = page.evaluate(SHOWN)
    assert text.startswith("trigger phrase: <bo>\nsuperclass: teddy\n")
    assert read_only
    # A node grows only where nothing gets covered; below this a text cannot be read (show_text.js).
    assert height >= 75
    page.wait_for_function(f"({PICTURES})() === 1")
    assert sorted(page.evaluate(SAVED)) == [[], ["bo.safetensors"]]
    sent = page.evaluate(GRAPH)
    assert {key: node["inputs"] for key, node in sent.items()} == {
        key: node["inputs"] for key, node in WORKFLOW.items()
    }
    assert complaints.found == [], "\n".join(complaints.found)
