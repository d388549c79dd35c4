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

from .interface import own_interface
from .report import say

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = Path(__file__).with_name("templates.json")

# Rows of columns, in each column groups of nodes one below the other. A node gets the height it
# needs in either renderer and after its work, when it shows pictures and texts.
ARRANGE = """async ({api, name, layout, reserve}) => {
    await window.app.loadApiJson(api, name);
    const graph = window.app.graph;
    const title = 30, gap = 50, margin = 20, between = 30;
    const place = (node, x, y, width, height) => {
        node.pos = [x, y];
        node.setSize([width, Math.max(height, reserve[node.type] ?? 0)]);
        for (const widget of node.widgets ?? []) {
            // A second run should find everything in the cache, not learn anew.
            if (widget.name === "control_after_generate") widget.value = "fixed";
        }
        return node.pos[1] + node.size[1];
    };
    const addNote = (x, y, width) => {
        const note = window.LiteGraph.createNode("MarkdownNote");
        graph.add(note);
        note.title = layout.title;
        note.widgets[0].value = layout.note.join("\\n");
        note.color = "#233";
        note.bgcolor = "#355";
        return place(note, x, y + title, width, layout.note_height) + between;
    };
    const addGroup = ({title: text, nodes}, x, y, width) => {
        const group = new window.LiteGraph.LGraphGroup(text);
        let bottom = y + gap + title;
        for (const id of nodes) {
            bottom = place(graph.getNodeById(id), x + margin, bottom, width - 2 * margin, 0) + gap;
        }
        bottom += margin - gap;
        group.pos = [x, y];
        group.size = [width, bottom - y];
        graph.add(group);
        return bottom + between;
    };
    let top = 0;
    for (const row of layout.rows) {
        let x = 0, lowest = top;
        for (const {width, groups} of row) {
            let y = top;
            for (const group of groups) {
                y = group === "note" ? addNote(x, y, width) : addGroup(group, x, y, width);
            }
            lowest = Math.max(lowest, y);
            x += width + between;
        }
        top = lowest;
    }
    return graph.serialize();
}"""
# The front end opens a page with this mark at a readable size (web/page_view.js).
MARK = {"perfusion_page": True}


def main() -> int:
    """Write every template; returns the exit status."""
    layouts = json.loads(LAYOUTS.read_text(encoding="utf-8"))
    reserve = layouts.pop("reserve")
    with own_interface() as (page, _):
        for name, places in layouts.items():
            source = ROOT / "workflows" / "api" / f"{name}.json"
            api = json.loads(source.read_text(encoding="utf-8"))
            told = {"api": api, "name": name, "layout": places, "reserve": reserve}
            graph = page.evaluate(ARRANGE, told)
            target = ROOT / "workflows" / f"{name}.json"
            target.write_text(json.dumps(tidy(graph), indent=1) + "\n", encoding="utf-8")
            say(f"Wrote {target}")
    return 0


def tidy(graph: dict[str, Any]) -> dict[str, Any]:
    """Drop what the browser fills with null, and what depends on how the window was scrolled."""
    graph["extra"] = dict(MARK)
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
