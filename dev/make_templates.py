"""Makes `workflows/*.json` (what the web interface opens) from `workflows/api/*.json`.

    .venv/bin/python -m dev.make_templates

The real web interface reads each workflow in API format and writes it in its own, so the two cannot
differ; only places, groups and the note come from `dev/templates.json`. Run it after a change of a
workflow or of a node's inputs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .chromium import find_chromium, launch, open_interface
from .prepare import Layout, make_server, prepare
from .report import Failure, say

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = Path(__file__).with_name("templates.json")

# Columns of nodes from left to right, a group around each, the note in front of them.
ARRANGE = """async ({api, name, layout}) => {
    await window.app.loadApiJson(api, name);
    const graph = window.app.graph;
    const top = 120, gap = 50, margin = 20;
    const note = window.LiteGraph.createNode("MarkdownNote");
    graph.add(note);
    note.title = layout.title;
    note.widgets[0].value = layout.note.join("\\n");
    note.pos = [0, top];
    note.size = [layout.note_width, layout.note_height];
    note.color = "#233";
    note.bgcolor = "#355";
    let x = layout.note_width + gap + 2 * margin;
    for (const column of layout.columns) {
        const group = new window.LiteGraph.LGraphGroup(column.title);
        const nodes = column.nodes.map(id => graph.getNodeById(id));
        const width = Math.max(...nodes.map(node => node.size[0]), column.width ?? 0);
        let y = top + 30;
        for (const node of nodes) {
            node.pos = [x, y];
            const height = (column.heights ?? {})[node.id] ?? node.size[1];
            node.setSize([width, height]);
            for (const widget of node.widgets ?? []) {
                // A second run should find everything in the cache, not learn anew.
                if (widget.name === "control_after_generate") widget.value = "fixed";
            }
            y += height + gap;
        }
        group.pos = [x - margin, top - 50];
        group.size = [width + 2 * margin, y - top + 50];
        graph.add(group);
        x += width + gap + 2 * margin;
    }
    return graph.serialize();
}"""


def main() -> int:
    """Write every template; returns the exit status."""
    executable = find_chromium()
    if executable is None:
        raise Failure("No Chromium found: install one or let CHROMIUM name it.")
    layouts = json.loads(LAYOUTS.read_text(encoding="utf-8"))
    layout = Layout(ROOT)
    host = prepare(layout, with_tests=True)
    with make_server(host, layout) as server, launch(executable) as browser:
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        open_interface(page, server.client)
        for name, places in layouts.items():
            source = ROOT / "workflows" / "api" / f"{name}.json"
            api = json.loads(source.read_text(encoding="utf-8"))
            graph = page.evaluate(ARRANGE, {"api": api, "name": name, "layout": places})
            target = ROOT / "workflows" / f"{name}.json"
            target.write_text(json.dumps(tidy(graph), indent=1) + "\n", encoding="utf-8")
            say(f"Wrote {target}")
    return 0


def tidy(graph: dict[str, Any]) -> dict[str, Any]:
    """Drop what the browser fills with null, and what depends on how the window was scrolled."""
    graph["extra"] = {}
    for node in graph["nodes"]:
        for key in [key for key, value in node.items() if value is None]:
            del node[key]
        for slot in (*node.get("inputs", []), *node.get("outputs", [])):
            for key in [key for key, value in slot.items() if value is None]:
                if key not in ("link", "links"):
                    del slot[key]
    return graph


if __name__ == "__main__":
    sys.exit(main())
