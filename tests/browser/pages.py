"""Looking at pages of the web interface the way a person does: what covers what, what is readable.

All sizes are in pixels of the page at zoom 1 unless they are said to be on screen.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parent.parent.parent
PICTURES = Path(os.environ.get("SCREENSHOTS", ROOT / ".cache" / "screenshots"))

WIDGET_TEXT = 12  # the smaller of the sizes in which nodes are written, on screen at zoom 1

# Every node's rectangle with its title; in Nodes 2.0 what its element takes.
BOXES = """() => window.app.graph.nodes.map(node => {
    const [x, y, width, height] = node.boundingRect;
    const box = {id: node.id, title: node.title, type: node.type, x, y, width, height};
    const element = document.querySelector(`[data-node-id="${node.id}"]`);
    if (window.LiteGraph.vueNodesMode && element) {
        const seen = element.getBoundingClientRect();
        box.width = seen.width / window.app.canvas.ds.scale;
        box.height = seen.height / window.app.canvas.ds.scale;
    }
    return box;
})"""
GROUPS = """() => window.app.graph.groups.map(({title, pos, size}) => (
    {title, x: pos[0], y: pos[1], width: size[0], height: size[1]}))"""
VIEW = """() => {
    const {scale, offset} = window.app.canvas.ds;
    const canvas = window.app.canvas.canvas.getBoundingClientRect();
    return {scale, x: offset[0], y: offset[1], width: canvas.width, height: canvas.height};
}"""
OPEN = """async ([graph, name]) => {
    await window.app.loadGraphData(graph, true, true, name, {openSource: "template"});
}"""
RUN = """async () => {
    const api = window.comfyAPI.api.api;
    window.perfusionEnd = null;
    for (const kind of ["success", "error", "interrupted"]) {
        api.addEventListener(`execution_${kind}`, event => {
            window.perfusionEnd = [kind, event.detail.exception_message ?? ""];
        }, {once: true});
    }
    await window.app.queuePrompt(0);
}"""
END = "() => window.perfusionEnd"


def overlaps(page: Page) -> set[tuple[str, str]]:
    """Pairs of nodes of which one covers a part of the other, and of groups and who sticks out."""
    boxes = page.evaluate(BOXES)
    sticking_out = {
        (group["title"], box["title"])
        for group in page.evaluate(GROUPS)
        for box in boxes
        if _common(group, box, "x", "width") > 1
        and _common(group, box, "y", "height") > 1
        and not (
            _common(group, box, "x", "width") > box["width"] - 1
            and _common(group, box, "y", "height") > box["height"] - 1
        )
    }
    return sticking_out | {
        (first["title"], second["title"])
        for at, first in enumerate(boxes)
        for second in boxes[at + 1 :]
        if _common(first, second, "x", "width") > 1 and _common(first, second, "y", "height") > 1
    }


def _common(first: dict[str, Any], second: dict[str, Any], at: str, size: str) -> float:
    end = min(first[at] + first[size], second[at] + second[size])
    return end - max(first[at], second[at])


def open_page(page: Page, name: str) -> None:
    """Open a template without the dialog, and wait until it stands still."""
    graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    page.evaluate(OPEN, [graph, name])
    settle(page)


def settle(page: Page) -> None:
    """Wait until no node changes its place or size any more."""
    before = None
    for _ in range(40):
        now = page.evaluate(BOXES), page.evaluate(VIEW)
        if now == before:
            return
        before = now
        page.wait_for_timeout(250)


def keep_picture(page: Page, name: str) -> None:
    """A screenshot for people to look at."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{re.sub('[^A-Za-z0-9]+', '-', name).strip('-')}.png")


def run(page: Page) -> set[tuple[str, str]]:
    """Run the open page to its end; returns what covered what at any time."""
    page.evaluate(RUN)
    covered: set[tuple[str, str]] = set()
    for _ in range(1200):
        covered |= overlaps(page)
        if (end := page.evaluate(END)) is not None:
            break
        page.wait_for_timeout(200)
    else:
        raise TimeoutError("the page's workflow did not end")
    assert end[0] == "success", end
    settle(page)
    return covered | overlaps(page)
