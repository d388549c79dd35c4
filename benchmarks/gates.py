"""The front between the concept and the rest of the prompt, under every key lock.

    python dev.py bench gates [--biases 0.3 0.4 ...] [--seeds 4]

The small world's ready concepts of one thing are drawn in eight settings with every bias of the
gate, from the same noise: the one trained with the twin lock with it, the one trained with the
local lock with the local and the global lock. The judge measures how much of the thing there is
(0: another of its kind, 1: the renderer's own pictures of it) and in how many pictures scene and
style are those asked for. Writes docs/gates.png: a row for each lock, a column for each bias.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from inprocess import load_pack

load_pack()

import torch  # noqa: E402
from comfyui_perfusion.demo.model.small_model import load_small_model  # noqa: E402
from comfyui_perfusion.host.injection.apply import apply_concepts  # noqa: E402
from comfyui_perfusion.perfusion import load_concept  # noqa: E402

from demo.fidelity import scene_fidelity, single_scale  # noqa: E402
from demo.generate import generate  # noqa: E402
from demo.judge import load_judge  # noqa: E402
from demo.measure import PROMPTS, SUBJECT  # noqa: E402
from demo.sheet import sheet  # noqa: E402
from demo.world import WEIGHTS, world_weights  # noqa: E402

from ._report import print_table, write_results  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONCEPTS = {"twin": "bo", "local": "bo_local_lock", "global": "bo_local_lock"}
"""For each key lock, which of demo/concepts was trained for it."""
BIASES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SHOWN = 0
"""Which of the pictures of a setting goes onto the sheet: always the first, whatever it shows."""


def main() -> int:
    """Measure, print the table, write benchmarks/results/gates.json and docs/gates.png."""
    parser = argparse.ArgumentParser(prog="dev.py bench gates", description=__doc__)
    parser.add_argument("--biases", nargs="+", type=float, default=list(BIASES))
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt")
    parser.add_argument("--sheet", type=Path, default=ROOT / "docs" / "gates.png")
    options = parser.parse_args()
    rows, pictures = measure(options.biases, options.seeds)
    print_table(rows)
    sheet(pictures, len(options.biases), scale=4).save(options.sheet)
    settings = {key: str(value) for key, value in vars(options).items()}
    print(f"Wrote {write_results('gates', settings, rows)} and {options.sheet}")
    return 0


def measure(biases: list[float], seeds: int) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """A row for each lock and bias, and the pictures for the sheet."""
    model, clip, vae = load_small_model(world_weights())
    judge = load_judge(WEIGHTS / "judge.safetensors")
    scale = single_scale(judge, SUBJECT)
    asked = [prompt for prompt in PROMPTS for _ in range(seeds)]
    photo = torch.tensor([style == "photo" for _, _, style in asked])
    rows, shown = [], []
    for lock, name in CONCEPTS.items():
        concept = load_concept(ROOT / "demo" / "concepts" / f"{name}.safetensors")
        texts = [text.format(concept.placeholder) for text, _, _ in asked]
        for bias in biases:
            patched, words = apply_concepts(model, clip, [concept.with_gate(bias=bias)], lock)
            pictures = generate(patched, words, vae, texts, seed=1)
            found = scene_fidelity(
                judge, pictures, [s for _, s, _ in asked], [s for *_, s in asked]
            )
            rows.append(
                {
                    "key lock": lock,
                    "bias": bias,
                    "concept fidelity": scale.of(judge, pictures[photo]),
                    "scene and style as asked": found,
                    "pictures": len(pictures),
                }
            )
            shown.append(pictures[SHOWN])
    return rows, torch.stack(shown)


if __name__ == "__main__":
    sys.exit(main())
