"""How well masks from the model's own attention fit: `python dev.py bench auto_mask`.

    python dev.py bench auto_mask [--pictures 16] [--trainings 3] [--sheet web/docs/auto_mask.png]

The small world's renderer knows where the things are. Figures are intersection over union with it,
the mean over pictures, and that of masks of the whole picture to compare with.

- Masks: the personal things, which the model never saw, each by the word for its kind; ordinary
  photographs of all kinds; any pictures of one thing, small ones and sketches among them; and
  pictures with a second thing of another kind beside it, which nothing but the word tells apart.
- Parts: what self-attention and the edges of the picture add, on the personal things and the
  photographs.
- Training (`--trainings 0` leaves it out): a concept of the demo's subject from five pictures,
  without masks, with these and with the renderer's, several times with different seeds. Concept
  fidelity is 1 for the renderer's own pictures of the thing and 0 for others of its kind; scene
  fidelity the share of pictures with scene and style as asked.

Writes benchmarks/results/auto_mask.json and the sheet: five pictures of the demo's subject, and
what the node shows of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inprocess import load_pack

load_pack()

from comfyui_perfusion.demo.model.small_model import load_small_model  # noqa: E402
from comfyui_perfusion.host.pictures.auto_mask import AutoMaskOptions, auto_mask  # noqa: E402
from comfyui_perfusion.host.pictures.training_images import encode_images  # noqa: E402
from comfyui_perfusion.host.training.view import training_view  # noqa: E402
from comfyui_perfusion.perfusion import Concept, TrainingConfig, train_concept  # noqa: E402
from comfyui_perfusion.perfusion.masks.soft_masks import MaskOptions, iou  # noqa: E402

from demo.classes import CLASS_NAMES, KINDS  # noqa: E402
from demo.measure import LEARNING_RATE, PLACEHOLDER, SUBJECT, World, single_figures  # noqa: E402
from demo.render import render  # noqa: E402
from demo.sheet import sheet  # noqa: E402
from demo.specs import Specs, sample_specs  # noqa: E402
from demo.things import SUBJECTS, photo_specs, superclass_of  # noqa: E402
from demo.world import personal_pictures, world_weights  # noqa: E402

from ._report import print_table, write_results  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SETS = PERSONAL, PHOTOS, ANY, TWO = "personal things", "photographs", "any picture", "two things"
FIRST_SEED = 7_200_000
STEPS = 150
PARTS = {
    "cross-attention alone": (False, False),
    "with self-attention": (True, False),
    "with edges": (False, True),
    "with both": (True, True),
}

Pictures = tuple[Tensor, Tensor]
"""Images (B, 48, 48, 3) and where the first thing is (B, 48, 48)."""


def picture_sets(
    count: int, names: Sequence[str] = SETS
) -> dict[tuple[str, str], tuple[Pictures, str]]:
    """(set, kind or name) -> pictures of it, and the word for it."""
    sets = {
        (PERSONAL, subject): (personal_pictures(subject, count, 0), superclass_of(subject))
        for subject in SUBJECTS
        if PERSONAL in names
    }
    for index, kind in enumerate(CLASS_NAMES):
        seed = FIRST_SEED + 10 * index
        drawn = {
            PHOTOS: photo_specs(count, seed),
            ANY: sample_specs(count, seed + 3, two_share=0.0),
            TWO: sample_specs(count, seed + 6, two_share=1.0),
        }
        for name in [name for name in names if name in drawn]:
            specs = drawn[name]
            specs.kind[:, 0] = index
            others = torch.arange(count) % (len(CLASS_NAMES) - 1)
            specs.kind[:, 1] = (index + 1 + others) % len(CLASS_NAMES)
            sets[name, kind] = (_rendered(specs), KINDS[kind].words[0])
    return sets


def _rendered(specs: Specs) -> Pictures:
    pictures, masks = render(specs)
    return pictures.permute(0, 2, 3, 1).float() / 255, masks[:, 0].contiguous()


def mask_rows(models: tuple[Any, Any, Any], count: int) -> list[dict[str, Any]]:
    """A row for each kind in each set, and one for the mean of each set."""
    rows: list[dict[str, Any]] = []
    for (name, kind), ((images, truth), word) in picture_sets(count).items():
        found = iou(auto_mask(*models, images, word).masks, truth)
        rows.append(
            {
                "pictures of": name,
                "kind": kind,
                "IoU": float(found.mean()),
                "worst picture": float(found.min()),
                "whole picture": float(iou(torch.ones_like(truth), truth).mean()),
                "pictures": len(images),
            }
        )
    for name in SETS:
        own = [row for row in rows if row["pictures of"] == name]
        means = {key: statistics.mean(row[key] for row in own) for key in ("IoU", "whole picture")}
        worst = min(own, key=lambda row: row["IoU"])
        rows.append(
            {
                "pictures of": name,
                "kind": f"mean (worst: {worst['kind']}, {worst['IoU']:.2f})",
                "IoU": means["IoU"],
                "worst picture": min(row["worst picture"] for row in own),
                "whole picture": means["whole picture"],
                "pictures": sum(row["pictures"] for row in own),
            }
        )
    return rows


def part_rows(models: tuple[Any, Any, Any], count: int) -> list[dict[str, Any]]:
    """A row for each way to make masks: mean IoU, and that of the worst kind."""
    sets = picture_sets(count, (PERSONAL, PHOTOS))
    rows = []
    for way, (alike, edges) in PARTS.items():
        options = AutoMaskOptions(MaskOptions(edges=edges), self_attention=alike)
        found = {
            key: float(iou(auto_mask(*models, images, word, options).masks, truth).mean())
            for key, ((images, truth), word) in sets.items()
        }
        row: dict[str, Any] = {"masks": way}
        for name in (PERSONAL, PHOTOS):
            own = [value for key, value in found.items() if key[0] == name]
            row |= {name: statistics.mean(own), f"{name}, worst kind": min(own)}
        rows.append({**row, "pictures": count * len(sets)})
    return rows


def training_rows(trainings: int) -> list[dict[str, Any]]:
    """A row for each kind of mask, mean and range over the seeds of training."""
    world = World()
    images, truth = personal_pictures(SUBJECT, 5, 0)
    word = superclass_of(SUBJECT)
    own = auto_mask(world.model, world.clip, world.vae, images, word).masks
    masks = {"none": None, "auto": own, "renderer's": truth}
    config = TrainingConfig(
        PLACEHOLDER,
        word,
        mode="twin_lock",
        steps=STEPS,
        batch_size=4,
        learning_rate=LEARNING_RATE,
        schedule="cosine",
    )
    concepts = {
        f"{name} {seed}": ([_trained(world, images, mask, replace(config, seed=seed))], PLACEHOLDER)
        for name, mask in masks.items()
        for seed in range(trainings)
    }
    figures, _ = single_figures(world, concepts)
    rows = []
    for name in masks:
        row: dict[str, Any] = {"masks": name}
        for kind in ("concept_fidelity", "scene_fidelity"):
            values = [figures[kind][f"{name} {seed}"] for seed in range(trainings)]
            row[kind.replace("_", " ")] = statistics.mean(values)
            row[f"{kind.split('_')[0]} range"] = f"{min(values):.2f} to {max(values):.2f}"
        rows.append({**row, "trainings": trainings})
    return rows


def _trained(world: World, images: Tensor, masks: Tensor | None, config: TrainingConfig) -> Concept:
    shown = encode_images(world.vae, [images], None if masks is None else [masks])
    words = config.superclass, config.placeholder
    with training_view(world.model, world.clip, shown, *words) as view:
        return train_concept(view, config, world.covariance(config.mode)).concept


def save_sheet(models: tuple[Any, Any, Any], path: Path) -> None:
    """Five pictures of the demo's subject above what the node shows of them."""
    images, _ = personal_pictures(SUBJECT, 5, 0)
    shown = auto_mask(*models, images, superclass_of(SUBJECT)).overlay
    both = (torch.cat([images, shown]) * 255).round().to(torch.uint8)
    sheet(both.permute(0, 3, 1, 2), len(images), scale=4).save(path)


def main() -> int:
    """Measure, print the tables, write the results and the sheet."""
    parser = argparse.ArgumentParser(prog="dev.py bench auto_mask", description=__doc__)
    parser.add_argument("--pictures", type=int, default=16, help="of each kind in each set")
    parser.add_argument("--trainings", type=int, default=3, help="for each kind of mask")
    parser.add_argument("--sheet", type=Path, default=ROOT / "web" / "docs" / "auto_mask.png")
    options = parser.parse_args()
    models = load_small_model(world_weights())
    save_sheet(models, options.sheet)
    tables = {
        "masks": mask_rows(models, options.pictures),
        "parts": part_rows(models, options.pictures),
    }
    if options.trainings:
        tables["training"] = training_rows(options.trainings)
    for rows in tables.values():
        print_table(rows)
        print()
    settings = {key: str(value) for key, value in vars(options).items()} | {"steps": STEPS}
    rows = [{"table": name, **row} for name, rows in tables.items() for row in rows]
    print(f"Wrote {write_results('auto_mask', settings, rows)} and {options.sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
