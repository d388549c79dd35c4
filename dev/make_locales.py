"""Makes `locales/<language>/nodeDefs.json`, which ComfyUI's interface reads, from `translations/`.

    .venv/bin/python -m dev.make_locales

A translation names every node and says what it does, and names every input; an input of the same
name is the same word on all nodes. Tooltips are translated by their English text: one that has
changed falls back to English, and a test says so, until its translation has been looked at again.
Run it after a change of a translation or of the nodes; it names what is missing.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inprocess import load_pack

from .report import say

ROOT = Path(__file__).resolve().parent.parent
TRANSLATIONS = ROOT / "dev" / "translations"
LOCALES = ROOT / "locales"


@dataclass(frozen=True)
class NodeTexts:
    """What there is to translate on a node: tooltips of inputs by name, and of outputs."""

    inputs: dict[str, str]
    outputs: list[str]


def node_texts() -> dict[str, NodeTexts]:
    """Every node with its texts in English."""
    load_pack()
    from comfyui_perfusion.nodes import NODES  # type: ignore[import-not-found]

    return {
        schema.node_id: NodeTexts(
            {entry.id: entry.tooltip for entry in schema.inputs},
            [entry.tooltip for entry in schema.outputs],
        )
        for schema in (node.define_schema() for node in NODES)
    }


def definitions(translation: dict[str, Any], nodes: dict[str, NodeTexts]) -> dict[str, Any]:
    """What the interface reads for one language; a tooltip that is missing stays in English.

    Raises:
        KeyError: for a node or the name of an input that the translation lacks.
    """
    tooltips = translation["tooltips"]

    def tooltip(text: str) -> dict[str, str]:
        return {"tooltip": literal(tooltips[text])} if text in tooltips else {}

    return {
        node: {
            **translation["nodes"][node],
            "inputs": {
                name: {"name": translation["inputs"][name], **tooltip(text)}
                for name, text in texts.inputs.items()
            },
            "outputs": {
                str(at): found for at, text in enumerate(texts.outputs) if (found := tooltip(text))
            },
        }
        for node, texts in nodes.items()
    }


def missing_tooltips(translation: dict[str, Any], nodes: dict[str, NodeTexts]) -> list[str]:
    """English texts without a translation."""
    texts = (text for node in nodes.values() for text in (*node.inputs.values(), *node.outputs))
    return [text for text in dict.fromkeys(texts) if text not in translation["tooltips"]]


def literal(text: str) -> str:
    """A text whose braces and signs the interface shows instead of reading them as commands."""
    return re.sub(r"\{\}|[@|{}]", lambda sign: f"{{'{sign[0]}'}}", text)


def main() -> int:
    """Write the file of every language; returns the exit status, 1 when a tooltip is missing."""
    nodes, status = node_texts(), 0
    for source in sorted(TRANSLATIONS.glob("*.json")):
        translation = json.loads(source.read_text(encoding="utf-8"))
        target = LOCALES / source.stem / "nodeDefs.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(definitions(translation, nodes), indent=1, ensure_ascii=False)
        target.write_text(f"{text}\n", encoding="utf-8")
        for english in missing_tooltips(translation, nodes):
            say(f"{source.name} has no tooltip for: {english}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
