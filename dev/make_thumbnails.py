"""Makes the templates' thumbnails: runs each workflow in a real ComfyUI and keeps its picture.

    .venv/bin/python -m dev.make_thumbnails [name ...]

Without names all of them. Run it after a change of the small world's weights, its concepts or a
workflow.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from PIL import Image

from .demo import run_workflow
from .prepare import Layout, make_server, prepare
from .report import say

ROOT = Path(__file__).resolve().parent.parent
QUALITY = 92


def main(names: list[str]) -> int:
    """Write a .jpg beside every template, or those of these names; returns the exit status."""
    layout = Layout(ROOT)
    with make_server(prepare(layout), layout) as server:
        for template in sorted((ROOT / "workflows").glob("*.json")):
            if names and template.stem not in names:
                continue
            say(f"Running {template.stem}")
            api = template.parent / "api" / template.name
            run = run_workflow(server.client, json.loads(api.read_text(encoding="utf-8")))
            picture = Image.open(io.BytesIO(server.client.picture(run.images("output")[0])))
            thumbnail = template.with_suffix(".jpg")
            picture.convert("RGB").save(thumbnail, quality=QUALITY)
            say(f"Wrote {thumbnail}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
