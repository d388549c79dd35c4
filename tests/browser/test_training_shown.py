"""What a training says stands on its node: while it runs, in another tab, after a reload."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from dev.chromium import READY, open_interface
from dev.server import Server
from tests.browser.pages import keep_picture, open_page, run

# A browser that draws without a graphics card takes its time on a busy machine.
pytestmark = pytest.mark.timeout(900)

NAME = "01 train a concept"
STEPS = """steps => {
    const node = window.app.graph.nodes.find(node => node.type === "PerfusionTrainConcept");
    node.widgets.find(widget => widget.name === "steps").value = steps;
    window.perfusionHeard = [];
    window.comfyAPI.api.api.addEventListener("perfusion.training", event => {
        window.perfusionHeard.push(document.querySelector(".perfusion-progress")?.innerText ?? "");
    });
}"""
HEARD = "() => window.perfusionHeard"
PANEL = """() => {
    const panel = document.querySelector(".perfusion-progress");
    return [panel.innerText, panel.querySelectorAll("polyline")[1].getAttribute("points")];
}"""
REPORTS = """() => window.app.graph.nodes
    .map(node => [node.type, node.widgets?.find(widget => widget.name === "perfusion_text")?.value])
    .filter(([, text]) => text)"""
ANOTHER_SEED = """() => {
    window.perfusionToasts = [];
    const toast = window.app.extensionManager.toast, add = toast.add;
    toast.add = message => {
        if (message.detail?.includes("met no step")) window.perfusionToasts.push(message.detail);
        add(message);
    };
    for (const node of window.app.graph.nodes.filter(node => node.type === "KSampler"))
        node.widgets.find(widget => widget.name === "seed").value += 1;
}"""
SAVED = "() => JSON.stringify(window.app.graph.serialize())"


@pytest.fixture(scope="module")
def trained(browser: Browser, comfy_server: Server) -> Iterator[Page]:
    """Template 1 after a training of 40 steps."""
    context = browser.new_context(viewport={"width": 1920, "height": 1080})
    page = context.new_page()
    open_interface(page, comfy_server.client)
    open_page(page, NAME)
    page.evaluate(STEPS, 40)
    run(page)
    yield page
    context.close()


def test_a_training_shows_step_time_losses_memory_and_their_curve(trained: Page) -> None:
    keep_picture(trained, "training shown on its node")
    text, curve = trained.evaluate(PANEL)
    assert "step 40 of 40" in text
    assert "smoothed" in text
    assert "GB in use on cpu" in text
    assert len(curve.split()) == 40
    heard = trained.evaluate(HEARD)
    assert any("left" in words for words in heard)


def test_reports_survive_another_tab_and_a_reload_and_are_not_in_the_workflow(
    trained: Page,
) -> None:
    said = dict(trained.evaluate(REPORTS))
    assert said["PerfusionTrainConcept"].startswith("40 steps")
    assert said["PerfusionSaveConcept"].startswith("my_bo")
    assert "40 steps" not in trained.evaluate(SAVED)
    trained.evaluate("async () => await window.app.extensionManager.command.execute("
                     "'Comfy.NewBlankWorkflow')")  # fmt: skip
    assert trained.evaluate(REPORTS) == []
    trained.get_by_text(NAME, exact=False).first.click()
    trained.wait_for_function(f"({REPORTS})().length >= 2")
    assert dict(trained.evaluate(REPORTS)) == said
    trained.reload()
    trained.wait_for_function(READY, timeout=120_000)
    trained.wait_for_function(f"({REPORTS})().length >= 2", timeout=30_000)
    assert dict(trained.evaluate(REPORTS)) == said


def test_a_template_opened_anew_shows_no_old_reports(trained: Page) -> None:
    open_page(trained, NAME)
    assert trained.evaluate(REPORTS) == []


def test_a_hint_is_said_on_the_page_and_on_the_node_that_applied_the_concept(
    trained: Page,
) -> None:
    open_page(trained, "05 gate schedule")
    trained.evaluate(
        """() => {
            const set = (node, name, value) => {
                node.widgets.find(widget => widget.name === name).value = value;
            };
            for (const node of window.app.graph.nodes) {
                if (node.type === "PerfusionScheduleGate") {
                    set(node, "start_percent", 0.97);
                    set(node, "end_percent", 0.98);
                }
                if (node.type === "KSampler") set(node, "steps", 2);
            }
        }"""
    )
    run(trained)
    keep_picture(trained, "hint on the node")
    hints = [text for kind, text in trained.evaluate(REPORTS) if kind == "PerfusionApplyConcepts"]
    assert len(hints) == 1
    assert hints[0].startswith("! the schedule of <bo> met no step")
    toast = trained.locator(".p-toast-message").filter(has_text="met no step")
    expect(toast).to_have_count(1)
    expect(toast).to_contain_text("Apply Concepts: scheduled")
    # Nothing has to run again: what was said still holds.
    run(trained)
    assert [text for _, text in trained.evaluate(REPORTS) if "met no" in text] == hints
    # Another run says it on the node and does not interrupt again, nor after a reload.
    for reload in (False, True):
        if reload:
            trained.reload()
            trained.wait_for_function(READY, timeout=120_000)
            trained.wait_for_function(f"({REPORTS})().length >= 1", timeout=30_000)
        trained.evaluate(ANOTHER_SEED)
        run(trained)
        assert trained.evaluate("() => window.perfusionToasts") == []
        assert [text for _, text in trained.evaluate(REPORTS) if "met no" in text] == hints
    # A run without anything to say takes it away.
    trained.evaluate(
        """() => {
            const gate = window.app.graph.nodes.find(n => n.type === "PerfusionScheduleGate");
            gate.widgets.find(widget => widget.name === "start_percent").value = 0;
        }"""
    )
    run(trained)
    assert [text for kind, text in trained.evaluate(REPORTS) if "met no" in text] == []
