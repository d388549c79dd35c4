"""Makes `subgraphs/*.json`, the blueprints in the interface's node library, from templates.

    .venv/bin/python -m dev.make_subgraphs

The real web interface turns nodes of a workflow in API format into one node; run it after a change
of those nodes' inputs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .interface import own_interface
from .make_templates import tidy
from .report import say

ROOT = Path(__file__).resolve().parent.parent
# Name, the workflow, the nodes that become one, and which of their widgets stand on it.
BLUEPRINTS: dict[str, tuple[str, list[int], list[tuple[int, str]]]] = {
    "Train a concept (Perfusion)": (
        "09 train on your photos (SD 1.5)",
        [3, 4, 5, 7],
        [
            *((3, "superclass"), (5, "superclass"), (5, "placeholder"), (5, "steps")),
            *((5, "seed"), (4, "resolution"), (7, "filename_prefix")),
        ],
    ),
    "Apply two concepts (Perfusion)": (
        "03 two concepts together",
        [2, 3, 6],
        [(2, "concept_name"), (3, "concept_name"), (6, "key_lock")],
    ),
}

MAKE = """async ({api, name, ids, shown}) => {
    await window.app.loadApiJson(api, name);
    const graph = window.app.graph;
    const inside = ids.map(id => graph.getNodeById(id));
    inside.forEach((node, at) => { node.pos = [at * 480, 0]; });
    for (const node of inside) {
        for (const widget of node.widgets ?? []) {
            if (widget.name === "control_after_generate") widget.value = "fixed";
        }
    }
    const {subgraph, node} = graph.convertToSubgraph(new Set(inside));
    subgraph.name = name;
    // Seeds become inputs by themselves; which widgets are shown is said below.
    for (const input of [...subgraph.inputs]) if (input.type === "INT") subgraph.removeInput(input);
    node.title = name;
    node.properties.proxyWidgets = shown.map(([id, widget]) => [String(id), widget]);
    for (const other of [...graph.nodes]) if (other !== node) graph.remove(other);
    node.pos = [0, 0];
    return graph.serialize();
}"""


def main() -> int:
    """Write every blueprint; returns the exit status."""
    with own_interface() as (page, _):
        for name, (workflow, ids, shown) in BLUEPRINTS.items():
            source = ROOT / "workflows" / "api" / f"{workflow}.json"
            api = json.loads(source.read_text(encoding="utf-8"))
            told: dict[str, Any] = {"api": api, "name": name, "ids": ids, "shown": shown}
            graph = tidy(page.evaluate(MAKE, told))
            graph["extra"] = {}
            graph["nodes"][0].pop("widgets_values", None)
            target = ROOT / "subgraphs" / f"{name}.json"
            target.parent.mkdir(exist_ok=True)
            target.write_text(json.dumps(graph, indent=1) + "\n", encoding="utf-8")
            say(f"Wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
