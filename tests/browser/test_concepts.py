"""Concepts at hand: the loader's menu, a dropped file, a right click, one that is not there."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from dev.chromium import open_interface
from dev.server import Server

ROOT = Path(__file__).resolve().parent.parent.parent
SHIPPED = ROOT / "demo" / "concepts" / "bo.safetensors"

ADD = """async type => {
    const node = window.LiteGraph.createNode(type);
    window.app.graph.add(node);
    await new Promise(done => setTimeout(done, 600));
    return node.id;
}"""
MENU = """id => {
    const widget = window.app.graph.getNodeById(id).widgets.find(w => w.name === "concept_name");
    return widget.options.values;
}"""
CARD = """() => {
    const card = document.querySelector(".perfusion-card");
    return [card?.innerText ?? "", card?.querySelector("img")?.naturalWidth ?? 0];
}"""
DROP = """async ([name, content]) => {
    const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name));
    const event = new DragEvent("drop", {
        dataTransfer: data, bubbles: true, cancelable: true, clientX: 700, clientY: 500,
    });
    window.app.canvas.canvas.dispatchEvent(event);
}"""
LIBRARY = """async () => await window.app.extensionManager.command.execute(
    "Workspace.ToggleSidebarTab.model-library")"""
LOADED = """() => window.app.graph.nodes.filter(node => node.type === "PerfusionLoadConcept")
    .map(node => node.widgets.find(widget => widget.name === "concept_name").value)"""
CLICK = """async ([id, text]) => {
    const node = window.app.graph.getNodeById(id);
    const items = window.app.collectNodeMenuItems(node);
    await items.find(item => item?.content === text).callback();
}"""
WIRED = """() => window.app.graph.nodes.filter(node => node.type === "PerfusionApplyConcepts")
    .map(node => node.inputs.filter(slot => slot.link != null).map(slot => slot.type))"""


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield context
    context.close()


@pytest.fixture(scope="module")
def page(context: BrowserContext, comfy_server: Server) -> Page:
    checkpoint = comfy_server.base / "models" / "perfusion" / "runs" / "bo-1" / "step_00050"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(SHIPPED, checkpoint.with_suffix(".safetensors"))
    page = context.new_page()
    open_interface(page, comfy_server.client)
    return page


@pytest.fixture(autouse=True)
def empty(page: Page) -> None:
    page.evaluate("() => window.app.graph.clear()")


def test_the_menu_lists_concepts_and_checkpoints_only_when_asked(page: Page) -> None:
    node = page.evaluate(ADD, "PerfusionLoadConcept")
    menu = page.evaluate(MENU, node)
    assert "bo.safetensors" in menu
    assert not [name for name in menu if name.startswith("runs")]
    page.evaluate(CLICK, [node, "List checkpoints of trainings"])
    assert "runs/bo-1/step_00050.safetensors" in page.evaluate(MENU, node)
    page.evaluate(CLICK, [node, "Hide checkpoints of trainings"])
    assert not [name for name in page.evaluate(MENU, node) if name.startswith("runs")]


def test_a_loader_shows_the_concepts_picture_and_words(page: Page) -> None:
    page.evaluate(ADD, "PerfusionLoadConcept")
    page.wait_for_function(f"({CARD})()[0].includes('<bo>')")
    text, _ = page.evaluate(CARD)
    assert text.split() == ["<bo>", "teddy,", "small_world"]


def test_the_menu_knows_a_concept_as_soon_as_it_is_saved(page: Page) -> None:
    node = page.evaluate(ADD, "PerfusionLoadConcept")
    assert "fresh_00001_.safetensors" not in page.evaluate(MENU, node)
    page.evaluate(
        """async () => {
            const load = window.app.graph.nodes[0];
            const save = window.LiteGraph.createNode("PerfusionSaveConcept");
            window.app.graph.add(save);
            save.widgets.find(widget => widget.name === "filename_prefix").value = "fresh";
            load.widgets.find(widget => widget.name === "concept_name").value = "bo.safetensors";
            load.connect(0, save, 0);
            await window.app.queuePrompt(0);
        }"""
    )
    page.wait_for_function(
        f"id => ({MENU})(id).includes('fresh_00001_.safetensors')", arg=node, timeout=30_000
    )


def test_a_dropped_concept_file_is_kept_and_gets_a_loader(page: Page, comfy_server: Server) -> None:
    content = base64.b64encode(SHIPPED.read_bytes()).decode()
    page.evaluate(DROP, ["from a friend.safetensors", content])
    page.wait_for_function(f"({LOADED})().length === 1", timeout=15_000)
    assert page.evaluate(LOADED) == ["from_a_friend.safetensors"]
    kept = comfy_server.base / "models" / "perfusion" / "from_a_friend.safetensors"
    assert kept.read_bytes() == SHIPPED.read_bytes()


def test_a_click_in_the_model_library_adds_a_loader_for_the_concept(page: Page) -> None:
    page.evaluate(LIBRARY)
    library = page.locator(".side-bar-panel")
    library.get_by_text("perfusion", exact=True).click()
    # Concepts are listed by their title, which is their word; the second click says where to.
    library.get_by_text("<olli>", exact=True).click()
    page.mouse.move(900, 500)
    page.mouse.click(900, 500)
    page.wait_for_function(f"({LOADED})().length === 1", timeout=15_000)
    assert page.evaluate(LOADED) == ["olli.safetensors"]
    page.evaluate(LIBRARY)


def test_a_dropped_file_that_is_damaged_is_refused_in_words(
    page: Page, comfy_server: Server
) -> None:
    content = base64.b64encode(SHIPPED.read_bytes()[:-100]).decode()
    page.evaluate(DROP, ["broken.safetensors", content])
    expect(page.locator(".p-toast-message").filter(has_text="damaged")).to_be_visible()
    assert page.evaluate(LOADED) == []
    assert not list((comfy_server.base / "models" / "perfusion").rglob("broken*"))
    page.evaluate("() => window.app.extensionManager.toast.removeAll?.()")


def test_a_right_click_wires_a_concept_and_copies_its_word(page: Page) -> None:
    node = page.evaluate(ADD, "PerfusionLoadConcept")
    page.evaluate(
        "id => { window.app.graph.getNodeById(id).widgets[0].value = 'bo.safetensors' }", node
    )
    page.evaluate(CLICK, [node, "Use in Apply Concepts"])
    assert page.evaluate(WIRED) == [["PERFUSION_CONCEPT"]]
    page.evaluate(CLICK, [node, "Copy trigger phrase"])
    assert page.evaluate("() => navigator.clipboard.readText()") == "<bo>"


def test_a_workflow_with_an_unknown_concept_says_which_and_whence(page: Page) -> None:
    file = ROOT / "workflows" / "02 use a concept.json"
    text = file.read_text(encoding="utf-8").replace("bo.safetensors", "lost_00001_.safetensors")
    page.evaluate(
        "async graph => { await window.app.loadGraphData(graph, true, true, 'lost') }",
        json.loads(text),
    )
    toast = page.locator(".p-toast-message").filter(has_text="lost_00001_.safetensors")
    expect(toast.first).to_be_visible()
    expect(toast.first).to_contain_text("is not in models/perfusion")
    expect(toast.first).to_contain_text("drop it on the page")
    page.wait_for_function(f"({CARD})()[0].includes('is not in models/perfusion')")
