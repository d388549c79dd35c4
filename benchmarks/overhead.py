"""How much longer a sampling step takes with concepts than without.

    python dev.py bench overhead [--families sd1 sdxl] [--rounds 7] [--steps 6] [--cpu] ...

One model, sampled by ComfyUI itself without the pack and with 1, 4 and 16 concepts, with global key
lock and with a moving gate. Every turn's figure is the median of its steps but the first (which
also loads, and computes what is computed once); each candidate is compared with the unpatched model
right before or after it. The table holds the median of these ratios and its standard error (from
the quartiles).

On a GPU it is the clock that counts, on a CPU the processor time of one thread, since two cores
shared with anything else cannot tell 1 % by the clock. A smaller --latent makes the share of the
concepts larger: the text does not shrink with the picture.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import sys
import time
from typing import Any

from inprocess import load_pack

load_pack()

import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import torch  # noqa: E402
from comfyui_perfusion.host.apply import apply_concepts  # noqa: E402
from comfyui_perfusion.host.families import family_of  # noqa: E402
from comfyui_perfusion.host.twin import with_twin  # noqa: E402
from comfyui_perfusion.perfusion import Schedule  # noqa: E402

from ._models import PUBLISHED_CHANNELS, random_concepts, random_model, text_encoder  # noqa: E402
from ._report import print_table, write_results  # noqa: E402

COUNTS = (0, 1, 4, 16)
TARGETS = {("sd1", "1 concept"): 1.01, ("sd1", "16 concepts"): 1.03}
UNPATCHED = "unpatched"


def main() -> int:
    """Measure, print the table, write benchmarks/results/overhead.json."""
    options = parse()
    # The prompts are noise, and that no gate opens needs no saying here.
    logging.getLogger("perfusion").setLevel(logging.ERROR)
    device = torch.device("cpu" if options.cpu or not torch.cuda.is_available() else "cuda")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        torch.set_num_threads(1)
    rows = []
    for family in options.families:
        rows += measure(family, options, device, dtype)
        comfy.model_management.unload_all_models()
    print_table(rows)
    settings = {**vars(options), "device": str(device), "dtype": str(dtype)}
    print(f"Wrote {write_results('overhead', settings, rows)}")
    return 0


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="dev.py bench overhead", description=__doc__)
    parser.add_argument("--families", nargs="+", default=["sd1", "sdxl"], choices=["sd1", "sdxl"])
    parser.add_argument("--channels", type=int, default=PUBLISHED_CHANNELS)
    parser.add_argument("--latent", type=int, default=64, help="side of the latent picture")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6, help="sampling steps per turn, 2 or more")
    parser.add_argument("--cpu", action="store_true", help="even where there is CUDA")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: the first step is not counted, so at least 2 are needed")
    return options


def measure(
    family: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """The rows of one family."""
    model = random_model(family, options.channels, device, dtype)
    patchers = candidates(model, family)
    conds = conditionings(model)
    seconds: dict[str, list[float]] = {name: [] for name in patchers}
    ratios: dict[str, list[float]] = {name: [] for name in patchers}
    for turn in range(-1, options.rounds):
        for name in patchers:
            pair = (UNPATCHED, name) if turn % 2 else (name, UNPATCHED)
            found = {
                key: step_seconds(patchers[key], conds, options, device)
                for key in dict.fromkeys(pair)
            }
            if turn >= 0:
                seconds[name].append(found[name])
                ratios[name].append(found[name] / found[UNPATCHED])
    rows = []
    for name, taken in seconds.items():
        quartiles = statistics.quantiles(ratios[name], n=4)
        target = TARGETS.get((family, name))
        rows.append(
            {
                "model": f"{family}, {options.channels} channels, {options.latent} x 2",
                "on it": name,
                "ms per step": 1000 * statistics.median(taken),
                "to unpatched": statistics.median(ratios[name]),
                # 1.2533 of the mean's, whose spread is read from the quartiles.
                "+-": 1.2533 * (quartiles[2] - quartiles[0]) / 1.349 / options.rounds**0.5,
                "target": "-" if target is None else f"<= {target}",
            }
        )
    return rows


def candidates(model: Any, family: str) -> dict[str, Any]:
    """Name -> patcher; all share the model's weights."""
    clip = text_encoder(family, layers=3)
    found = {UNPATCHED: model}
    for count in COUNTS:
        name = f"{count} concept{'' if count == 1 else 's'}"
        found[name] = apply_concepts(model, clip, random_concepts(model, count))[0]
    one = random_concepts(model, 1)
    found["1, global key lock"] = apply_concepts(model, clip, one, "global")[0]
    moving = [one[0].with_schedule(Schedule(0, 1, (0.4, 0.7), (0.1, 0.2)))]
    found["1, moving gate"] = apply_concepts(model, clip, moving)[0]
    return found


def conditionings(model: Any) -> tuple[list[Any], list[Any]]:
    """A positive and a negative conditioning of noise, each with a twin."""
    generator = torch.Generator().manual_seed(2)
    width = family_of(model.model).width

    def one() -> list[Any]:
        encodings, twin = (torch.randn(1, 77, width, generator=generator) for _ in range(2))
        pooled = torch.randn(1, 1280, generator=generator)
        return [[with_twin(encodings, twin), {"pooled_output": pooled}]]

    return one(), one()


def step_seconds(
    patcher: Any,
    conds: tuple[list[Any], list[Any]],
    options: argparse.Namespace,
    device: torch.device,
) -> float:
    """Median time of the steps of one sampling run, but for the first; see the module's text."""
    ends: list[float] = []

    def on_step(*_: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.process_time() if device.type == "cpu" else time.perf_counter())

    latent = torch.zeros(1, 4, options.latent, options.latent)
    with torch.inference_mode():
        comfy.sample.sample(
            patcher,
            comfy.sample.prepare_noise(latent, 0),
            options.steps,
            7.0,
            "euler",
            "normal",
            *conds,
            latent,
            callback=on_step,
            disable_pbar=True,
            seed=0,
        )
    return statistics.median(after - before for before, after in itertools.pairwise(ends))


if __name__ == "__main__":
    sys.exit(main())
