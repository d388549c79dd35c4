"""Makes the templates' thumbnails: runs each workflow in a real ComfyUI and keeps its picture.

    .venv/bin/python -m dev.make_thumbnails [name ...]

Without names all of them. Run it after a change of the small world's weights, its concepts or a
workflow. Those for real checkpoints have no picture of their own here; they get a card that says
which model they are for.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .demo import run_workflow
from .prepare import Layout, make_server, prepare
from .report import say

ROOT = Path(__file__).resolve().parent.parent
QUALITY = 92
CARDS = {
    "09 train on your photos (SD 1.5)": ("your photos", "SD 1.5", 5),
    "10 train on your photos (SDXL)": ("your photos", "SDXL", 5),
    "11 use your concept": ("<your-thing>", "in a prompt", 1),
}


def draw_card(above: str, below: str, frames: int) -> Image.Image:
    """Frames of photos, as many as asked for, between two lines of text."""
    side, blue = 384, (63, 120, 158)
    card = Image.new("RGB", (side, side), (34, 51, 51))
    pen = ImageDraw.Draw(card)
    for text, y, size in ((above, 56, 40), (below, 318, 56)):
        font = ImageFont.load_default(size)
        pen.text((side / 2, y), text, fill="white", font=font, anchor="mm")
    width = 60 if frames > 1 else 130
    start = (side - frames * (width + 8) + 8) / 2
    for at in range(frames):
        x, y = start + at * (width + 8), side / 2 - width / 2 - 5
        pen.rectangle((x, y, x + width, y + width), fill=(238, 238, 230), outline=blue, width=3)
        # The same thing before another horizon in each.
        horizon = y + width * (0.5 + 0.08 * (at % 3))
        pen.rectangle(
            (x + 5, horizon, x + width - 5, y + width - 5), fill=(120 + 25 * at, 160, 120)
        )
        middle, size = x + width / 2, width / 5
        pen.ellipse(
            (middle - size, horizon - size, middle + size, horizon + size), fill=(200, 120, 60)
        )
    return card


def main(names: list[str]) -> int:
    """Write a .jpg beside every template, or those of these names; returns the exit status."""
    layout = Layout(ROOT)
    with make_server(prepare(layout), layout) as server:
        for template in sorted((ROOT / "workflows").glob("*.json")):
            if names and template.stem not in names:
                continue
            if template.stem in CARDS:
                draw_card(*CARDS[template.stem]).save(template.with_suffix(".jpg"), quality=QUALITY)
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
