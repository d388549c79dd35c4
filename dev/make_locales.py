"""Makes `locales/<language>/nodeDefs.json`, which ComfyUI's interface reads, from `translations/`.

    .venv/bin/python -m dev.make_locales

A translation names every node and says what it does, and names every input; an input of the same
name is the same word on all nodes. Tooltips are in English. Run it after a change of a translation
or of the nodes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from inprocess import load_pack

ROOT = Path(__file__).resolve().parent.parent
TRANSLATIONS = ROOT / "dev" / "translations"
LOCALES = ROOT / "locales"


def node_inputs() -> dict[str, list[str]]:
    """Every node with the names of its inputs."""
    load_pack()
    from comfyui_perfusion.nodes import NODES  # type: ignore[import-not-found]

    schemas = [node.define_schema() for node in NODES]
    return {schema.node_id: [entry.id for entry in schema.inputs] for schema in schemas}


def definitions(translation: dict[str, Any], nodes: dict[str, list[str]]) -> dict[str, Any]:
    """What the interface reads for one language.

    Raises:
        KeyError: for a node or an input that the translation lacks.
    """
    return {
        node: {
            **translation["nodes"][node],
            "inputs": {name: {"name": translation["inputs"][name]} for name in names},
        }
        for node, names in nodes.items()
    }


def main() -> int:
    """Write the file of every language; returns the exit status."""
    nodes = node_inputs()
    for source in sorted(TRANSLATIONS.glob("*.json")):
        translation = json.loads(source.read_text(encoding="utf-8"))
        target = LOCALES / source.stem / "nodeDefs.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(definitions(translation, nodes), indent=1, ensure_ascii=False)
        target.write_text(f"{text}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
