"""Makes a film strip of "your five photos": photos as files, the page, the training, the picture.

    .venv/bin/python -m dev.make_film [FOLDER]

Drives the real web interface with template 9, into which the small world's model is put in the
place of the checkpoint; the rest is what a person would set for it. Once in each of the interface's
two renderers; the screenshots and a strip of each go to FOLDER (demo-output/film).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from PIL import Image, ImageDraw, ImageFont

from .interface import own_interface
from .report import Failure, say

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "workflows" / "09 train on your photos (SD 1.5).json"
PATTERN = ROOT / "workflows" / "api" / "01 train a concept.json"  # the small world's own settings
SUBJECT, FOLDER = "Bo the teddy", "my_bo"
SIZE = 1700, 1760
TURNED = 6  # EXIF: the photo was taken upright with a camera held sideways
HEIGHT, CAPTION = 760, 40
# Parts of the training after which a picture of the page is taken.
MOMENTS = (0.2, 0.6)
POLLING, PATIENCE = 300, 1_800_000  # milliseconds
STEP = "() => document.querySelector('.perfusion-progress')?.innerText.split(' · ')[0] ?? 'begun'"

# The page with what suits the small world, and ears for what happens.
CHANGE = """async ([graph, name, changes]) => {
    await window.app.loadGraphData(graph, true, true, name, {openSource: "template"});
    const page = window.app.graph;
    for (const [id, values] of Object.entries(changes)) {
        for (const [key, value] of Object.entries(values)) {
            const widget = page.getNodeById(id).widgets.find(widget => widget.name === key);
            widget.value = value;
        }
    }
    window.perfusionStep = 0;
    window.perfusionEnd = null;
    const api = window.comfyAPI.api.api;
    api.addEventListener("perfusion.training", event => {
        window.perfusionStep = event.detail.step / event.detail.steps;
    });
    for (const kind of ["success", "error", "interrupted"]) {
        api.addEventListener(`execution_${kind}`, event => {
            window.perfusionEnd = [kind, event.detail.exception_message ?? ""];
        });
    }
}"""
# Left, top, right and bottom of a group on the screen, or of all of them.
PLACE = """title => {
    const {graph, canvas: {ds: {scale, offset}, canvas}} = window.app;
    const groups = graph.groups.filter(group => !title || group.title === title);
    const {left, top} = canvas.getBoundingClientRect();
    const at = (place, from, side) => from + (place + offset[side]) * scale;
    return [
        at(Math.min(...groups.map(({pos}) => pos[0])), left, 0),
        at(Math.min(...groups.map(({pos}) => pos[1])), top, 1),
        at(Math.max(...groups.map(({pos, size}) => pos[0] + size[0])), left, 0),
        at(Math.max(...groups.map(({pos, size}) => pos[1] + size[1])), top, 1),
    ];
}"""
FIT = """() => {
    const {graph, canvas} = window.app;
    const boxes = graph.groups.map(group => [...group.pos, ...group.size]);
    const left = Math.min(...boxes.map(box => box[0]), 0);
    const top = Math.min(...boxes.map(box => box[1]), 0);
    const right = Math.max(...boxes.map(box => box[0] + box[2]));
    const bottom = Math.max(...boxes.map(box => box[1] + box[3]));
    const view = canvas.canvas.getBoundingClientRect();
    const room = [view.width - 110, view.height - 150];
    const scale = Math.min(room[0] / (right - left), room[1] / (bottom - top));
    canvas.ds.scale = scale;
    canvas.ds.offset[0] = 80 / scale - left;
    canvas.ds.offset[1] = 90 / scale - top;
    canvas.setDirty(true, true);
}"""


def write_photos(folder: Path) -> Image.Image:
    """Five photos as files, two of them upright; returns a picture of the folder."""
    from demo.world import personal_pictures

    folder.mkdir(parents=True)
    pictures, _ = personal_pictures(SUBJECT, 5, 0)
    sheet = Image.new("RGB", (5 * 130, 160), (34, 51, 51))
    pen = ImageDraw.Draw(sheet)
    for at, pixels in enumerate(pictures):
        picture = Image.fromarray((pixels.numpy() * 255).round().astype(numpy.uint8))
        name = f"IMG_{1201 + at}.png"
        exif = Image.Exif()
        stored = picture.resize((1024, 1024), Image.Resampling.NEAREST)
        if at in (1, 3):
            exif[0x0112], stored = TURNED, stored.transpose(Image.Transpose.ROTATE_90)
        stored.save(folder / name, exif=exif)
        sheet.paste(stored.resize((120, 120), Image.Resampling.NEAREST), (5 + 130 * at, 8))
        pen.text((65 + 130 * at, 144), name, fill="white", anchor="mm")
    return sheet


def changes() -> dict[str, dict[str, Any]]:
    """Widgets of template 9 by node, as the small world's own template has them."""
    pattern = json.loads(PATTERN.read_text(encoding="utf-8"))
    api = TEMPLATE.parent / "api" / TEMPLATE.name
    page = json.loads(api.read_text(encoding="utf-8"))
    own = {node["class_type"]: node["inputs"] for node in pattern.values()}
    prompts = [node["inputs"]["text"] for node in pattern.values() if "text" in node["inputs"]]
    kinds = ("PerfusionTrainConcept", "PerfusionSaveConcept", "KSampler", "EmptyLatentImage")
    found: dict[str, dict[str, Any]] = {}
    for key, node in page.items():
        kind = node["class_type"]
        if kind in kinds:
            found[key] = {name: value for name, value in own[kind].items() if not wired(value)}
        if kind == "PerfusionLoadPhotos":
            found[key] = {"folder": FOLDER}
        if kind == "PerfusionAutoMask":
            found[key] = {"superclass": own["PerfusionTrainConcept"]["superclass"]}
        if kind == "PerfusionTrainingOptions":
            found[key] = {"resolution": 0, "sample_cfg": own["KSampler"]["cfg"]}
        if kind == "CLIPTextEncode":
            found[key] = {"text": prompts.pop(0)}
    return found


def with_small_model() -> dict[str, Any]:
    """The page with the small world's model in the place of its checkpoint."""
    graph = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        if node["type"] == "CheckpointLoaderSimple":
            node["type"], node["title"] = "PerfusionDemoModel", "Load Demo Model: the model"
            for key in ("widgets_values", "inputs", "properties"):
                node.pop(key, None)
    return graph


def wired(value: object) -> bool:
    """Whether an input's value is a link."""
    return isinstance(value, list)


def film(page: Page, folder: Path, name: str) -> list[tuple[str, Image.Image]]:
    """Pictures of the page before, while and after its run, each with what it shows."""
    page.evaluate(CHANGE, [with_small_model(), TEMPLATE.stem, changes()])
    frames = [("2  the page, ready to run", shot(page, folder, f"{name}-2-before"))]
    page.evaluate("async () => { await window.app.queuePrompt(0); }")
    for at, share in enumerate(MOMENTS):
        page.wait_for_function(
            "share => window.perfusionStep >= share || window.perfusionEnd",
            arg=share,
            polling=POLLING,
            timeout=PATIENCE,
        )
        picture = shot(page, folder, f"{name}-{3 + at}-while")
        frames.append((f"{3 + at}  {page.evaluate(STEP)}", part(page, picture, "Learn")))
    page.wait_for_function("() => window.perfusionEnd", polling=POLLING, timeout=PATIENCE)
    kind, error = page.evaluate("() => window.perfusionEnd")
    if kind != "success":
        raise Failure(f"The page's workflow ended with {kind}: {error}")
    picture = shot(page, folder, f"{name}-5-after")
    frames.append(("5  learned", part(page, picture, "Learn")))
    whole = part(page, picture)
    whole.save(folder / f"five_photos_{name}.jpg", quality=88)  # docs/five_photos.jpg
    frames.append(("6  kept, and painted", whole))
    return frames


def shot(page: Page, folder: Path, name: str) -> Image.Image:
    """A screenshot of the whole page, once it stands still."""
    page.evaluate(FIT)
    page.wait_for_timeout(1500)
    file = folder / f"{name}.png"
    # A browser that draws without a graphics card takes its time on a busy machine.
    page.screenshot(path=file, timeout=PATIENCE)
    return Image.open(file).convert("RGB")


def part(page: Page, picture: Image.Image, group: str = "") -> Image.Image:
    """What a group of the page takes up in its screenshot; without a name, all of them."""
    left, top, right, bottom = (round(side) for side in page.evaluate(PLACE, group))
    return picture.crop((left, top, right, bottom))


def strip(frames: list[tuple[str, Image.Image]]) -> Image.Image:
    """The frames side by side at one height, each under its caption."""
    small = [(text, fitted(picture)) for text, picture in frames]
    width = sum(picture.width + 10 for _, picture in small) + 10
    sheet = Image.new("RGB", (width, HEIGHT + CAPTION + 10), (24, 30, 30))
    pen, font, x = ImageDraw.Draw(sheet), ImageFont.load_default(20), 10
    for text, picture in small:
        pen.text((x + 4, CAPTION / 2), text, fill="white", font=font, anchor="lm")
        sheet.paste(picture, (x, CAPTION + (HEIGHT - picture.height) // 2))
        x += picture.width + 10
    return sheet


def fitted(picture: Image.Image) -> Image.Image:
    """A picture at most HEIGHT high."""
    scale = min(1, HEIGHT / picture.height)
    size = round(picture.width * scale), round(picture.height * scale)
    return picture.resize(size, Image.Resampling.LANCZOS)


def main(arguments: list[str]) -> int:
    """Write screenshots and strips; returns the exit status."""
    folder = Path(arguments[0]) if arguments else ROOT / "demo-output" / "film"
    folder.mkdir(parents=True, exist_ok=True)
    for renderer, nodes2 in (("classic", False), ("nodes2", True)):
        # A server of its own for each: the second would find everything in the first one's cache.
        with own_interface(SIZE, nodes2) as (page, server):
            photos = write_photos(server.base / "input" / FOLDER)
            frames = [("1  photos as files", photos), *film(page, folder, renderer)]
            (painted,) = (server.base / "output" / "perfusion").glob("*.png")
            result = Image.open(painted).convert("RGB")
            result = result.resize((384, 384), Image.Resampling.NEAREST)
            frames.append(("7  the picture", result))
        target = folder / f"film-{renderer}.png"
        strip(frames).save(target)
        say(f"Wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
