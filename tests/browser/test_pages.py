"""The templates as pages, in both renderers: nothing covers anything, everything is readable."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from dev.chromium import open_interface
from dev.server import Server
from tests.browser.pages import (
    BOXES,
    ROOT,
    VIEW,
    WIDGET_TEXT,
    keep_picture,
    open_page,
    overlaps,
    run,
    settle,
)
from tests.real_models import CAPTIONS, TRAIN, TRAIN_SDXL, prepare, train_once

# A browser that draws without a graphics card takes its time on a busy machine.
pytestmark = pytest.mark.timeout(900)

TEMPLATES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
SIZES = ((1600, 1000), (1920, 1080))
SMALLEST = 8.0  # pixels on screen of the smallest writing

# Two steps are enough to see what a node shows afterwards.
SHORTEN = """captions => {
    const {app, LiteGraph} = window;
    const changes = {
        PerfusionTrainConcept: {steps: 4},
        PerfusionTrainingOptions: {sample_every: 2, sample_steps: 2},
        KSampler: {steps: 2},
    };
    const real = {
        PerfusionTrainConcept: {steps: 2, batch_size: 1},
        PerfusionTrainingOptions: {resolution: 64, sample_steps: 2},
        PerfusionAutoMask: {resolution: 64, draws: 1},
        EmptyLatentImage: {width: 64, height: 64},
        KSampler: {steps: 2},
    };
    const loader = app.graph.nodes.find(node => node.type === "CheckpointLoaderSimple");
    const shorter = loader ? real : changes;
    for (const node of [...app.graph.nodes]) {
        for (const [name, value] of Object.entries(shorter[node.type] ?? {})) {
            node.widgets.find(widget => widget.name === name).value = value;
        }
        if (loader && node.type === "PerfusionTrainConcept") {
            const covariance = LiteGraph.createNode("PerfusionCovariance");
            app.graph.add(covariance);
            covariance.pos = [-900, 0];
            covariance.widgets.find(widget => widget.name === "captions").value = captions;
            loader.connect(1, covariance, 0);
            covariance.connect(0, node, node.inputs.findIndex(slot => slot.name === "covariance"));
        }
    }
}"""


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def rendered(
    request: pytest.FixtureRequest, browser: Browser, comfy_server: Server
) -> Iterator[tuple[Page, str]]:
    """The web interface in one of its two renderers."""
    prepare(comfy_server)
    train_once(comfy_server)
    comfy_server.client.json("/settings/Comfy.VueNodes.Enabled", request.param == "nodes2")
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    open_interface(page, comfy_server.client)
    assert page.evaluate("() => window.LiteGraph.vueNodesMode") == (request.param == "nodes2")
    yield page, request.param
    context.close()
    comfy_server.client.json("/settings/Comfy.VueNodes.Enabled", False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_page_opens_readable_with_nothing_over_anything_and_its_note_in_sight(
    rendered: tuple[Page, str], name: str
) -> None:
    page, renderer = rendered
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        open_page(page, name)
        keep_picture(page, f"{name} {renderer} {width} opened")
        view = page.evaluate(VIEW)
        assert view["scale"] * WIDGET_TEXT >= SMALLEST
        assert overlaps(page) == set()
        (note,) = (box for box in page.evaluate(BOXES) if box["type"] == "MarkdownNote")
        left, top = (note[at] + view[at] for at in ("x", "y"))
        assert left >= 0
        assert top >= 0
        assert (left + note["width"]) * view["scale"] <= view["width"]
        assert (top + note["height"]) * view["scale"] <= view["height"]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != TRAIN_SDXL])
def test_nothing_on_a_page_covers_anything_while_it_runs_and_afterwards(
    rendered: tuple[Page, str], name: str
) -> None:
    page, renderer = rendered
    page.set_viewport_size({"width": 1920, "height": 1080})
    open_page(page, name)
    page.evaluate(SHORTEN, CAPTIONS)
    settle(page)
    covered = run(page)
    keep_picture(page, f"{name} {renderer} 1920 run")
    assert covered == set()


def test_titles_say_the_node_and_what_it_is_for(rendered: tuple[Page, str]) -> None:
    page, _ = rendered
    open_page(page, TRAIN)
    titles = {box["type"]: box["title"] for box in page.evaluate(BOXES)}
    assert titles["PerfusionTrainConcept"] == "Train Concept: learn it"
    assert titles["KSampler"] == "KSampler: paint"
