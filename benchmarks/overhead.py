"""How much longer a sampling step takes with concepts than without.

    python dev.py bench overhead [--families sd1 sdxl anima] [--rounds 7] [--steps 6] [--cpu] ...

One model, sampled by ComfyUI itself without the pack and with 1, 4 and 16 concepts, with local,
global and twin lock and with a moving gate. Every turn's figure is the median of its steps but the
first (which also loads, and computes what is computed once); each candidate is compared with the
unpatched model right before or after it. The table holds the median of these ratios and its
standard error (from the quartiles).

Whole steps vary by more than a concept costs. On a CPU the table therefore also holds what a step
spends in the only two places the pack touches: the text's key and value projections, and what lies
around the model's call. "added" is how much more that is than without the pack, as a share of the
unpatched step.

Anima stands for transformers: its width with a few of its equal blocks, its 512 text tokens.

On a GPU it is the clock that counts, on a CPU the processor time of one thread. A smaller --latent
makes the share of the concepts larger: the text does not shrink with the picture.
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
from comfyui_perfusion.host.injection.apply import apply_concepts  # noqa: E402
from comfyui_perfusion.host.models.families import cross_attentions, family_of  # noqa: E402
from comfyui_perfusion.host.text.twin import with_twin  # noqa: E402
from comfyui_perfusion.perfusion import GateSchedule  # noqa: E402

from ._models import PUBLISHED_CHANNELS, random_concepts, random_model, text_encoder  # noqa: E402
from ._report import print_table, write_results  # noqa: E402
from ._transformers import BLOCKS, TOKENS, anima_text_encoder, random_anima  # noqa: E402

COUNTS = (0, 1, 4, 16)
FAMILIES = ("sd1", "sdxl", "anima")
TARGETS = {
    (family, name): target
    for family in ("sd1", "anima")
    for name, target in (("1 concept", 1.01), ("16 concepts", 1.03))
} | {
    (family, f"{count}, twin lock"): target
    for family in ("sd1", "anima")
    for count, target in ((1, 1.01), (16, 1.03))
}
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
    print(f"Wrote {write_results('overhead', settings, rows, options.families)}")
    return 0


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="dev.py bench overhead", description=__doc__)
    parser.add_argument("--families", nargs="+", default=["sd1", "sdxl"], choices=FAMILIES)
    parser.add_argument("--channels", type=int, default=PUBLISHED_CHANNELS)
    parser.add_argument("--latent", type=int, default=64, help="side of the latent picture")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of a transformer")
    parser.add_argument("--only", nargs="+", help="names of candidates, all of them by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6, help="sampling steps per turn, 2 or more")
    parser.add_argument("--cpu", action="store_true", help="even where there is CUDA")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: a spread needs at least 2")
    if options.steps < 2:
        parser.error("--steps: the first step is not counted, so at least 2 are needed")
    return options


def measure(
    family: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """The rows of one family."""
    if family == "anima":
        model = random_anima(options.blocks, device, dtype)
        shape = f"{family}, {options.blocks} blocks, {options.latent} x 2"
    else:
        model = random_model(family, options.channels, device, dtype)
        shape = f"{family}, {options.channels} channels, {options.latent} x 2"
    patchers = candidates(model, family)
    if options.only:
        patchers = {name: patchers[name] for name in (UNPATCHED, *options.only)}
    conds = conditionings(model)
    base = model.model
    stopwatch = Stopwatch(base) if device.type == "cpu" else None
    seconds: dict[str, list[float]] = {name: [] for name in patchers}
    touched: dict[str, list[float]] = {name: [] for name in patchers}
    more: dict[str, list[float]] = {name: [] for name in patchers}
    ratios: dict[str, list[float]] = {name: [] for name in patchers}
    for turn in range(-1, options.rounds):
        for name in patchers:
            pair = (UNPATCHED, name) if turn % 2 else (name, UNPATCHED)
            found = {
                key: step_seconds(patchers[key], conds, options, device, stopwatch)
                for key in dict.fromkeys(pair)
            }
            if turn >= 0:
                seconds[name].append(found[name][0])
                touched[name].append(found[name][1])
                more[name].append(found[name][1] - found[UNPATCHED][1])
                ratios[name].append(found[name][0] / found[UNPATCHED][0])
    rows = []
    for name, taken in seconds.items():
        quartiles = statistics.quantiles(ratios[name], n=4)
        target = TARGETS.get((family, name))
        share = statistics.median(more[name]) / statistics.median(seconds[UNPATCHED])
        rows.append(
            {
                "model": shape,
                "on it": name,
                "ms per step": 1000 * statistics.median(taken),
                "to unpatched": statistics.median(ratios[name]),
                # 1.2533 of the mean's, whose spread is read from the quartiles.
                "+-": 1.2533 * (quartiles[2] - quartiles[0]) / 1.349 / options.rounds**0.5,
                "touched ms": 1000 * statistics.median(touched[name]) if stopwatch else "-",
                "added %": 100 * share if stopwatch else "-",
                "target": "-" if target is None else f"<= {target}",
            }
        )
    return rows


def candidates(model: Any, family: str) -> dict[str, Any]:
    """Name -> patcher; all share the model's weights."""
    clip = anima_text_encoder() if family == "anima" else text_encoder(family, layers=3)
    found = {UNPATCHED: model}
    for count in COUNTS:
        name = f"{count} concept{'' if count == 1 else 's'}"
        found[name] = apply_concepts(model, clip, random_concepts(model, count))[0]
    one = random_concepts(model, 1)
    found["1, global key lock"] = apply_concepts(model, clip, one, "global")[0]
    moving = [one[0].with_schedule(GateSchedule(0, 1, (0.4, 0.7), (0.1, 0.2)))]
    found["1, moving gate"] = apply_concepts(model, clip, moving)[0]
    for count in (1, 16):
        concepts = random_concepts(model, count)
        found[f"{count}, twin lock"] = apply_concepts(model, clip, concepts, "twin")[0]
    found["1, twin lock, moving gate"] = apply_concepts(model, clip, moving, "twin")[0]
    return found


def conditionings(model: Any) -> tuple[list[Any], list[Any]]:
    """A positive and a negative conditioning of noise, each with a twin."""
    generator = torch.Generator().manual_seed(2)
    family = family_of(model.model)
    tokens = TOKENS if family.name == "anima" else 77

    def one() -> list[Any]:
        encodings, twin = (
            torch.randn(1, tokens, family.width, generator=generator) for _ in range(2)
        )
        pair = with_twin(encodings, twin, frozenset({"<0>"}))
        return [[pair, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]

    return one(), one()


def step_seconds(
    patcher: Any,
    conds: tuple[list[Any], list[Any]],
    options: argparse.Namespace,
    device: torch.device,
    stopwatch: Stopwatch | None,
) -> tuple[float, float]:
    """Median time of the steps of one sampling run but for the first, and of what is touched."""
    ends: list[float] = []
    inside: list[float] = []

    def on_step(*_: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        if stopwatch is not None:
            inside.append(stopwatch.read())
            stopwatch.start()
        ends.append(time.process_time() if device.type == "cpu" else time.perf_counter())

    shape = (patcher.model.latent_format.latent_channels, options.latent, options.latent)
    latent = comfy.sample.fix_empty_latent_channels(patcher, torch.zeros(1, *shape))
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
    if stopwatch is not None:
        stopwatch.remove()
    step = statistics.median(after - before for before, after in itertools.pairwise(ends))
    return step, statistics.median(inside[1:])


class Stopwatch:
    """Processor time in a model's text projections and around its call, while it is started."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self._projections = [
            module for layer in cross_attentions(base) for module in (layer.to_k, layer.to_v)
        ]
        self._before: list[tuple[Any, str, Any]] = []
        self._spent = 0.0

    def start(self) -> None:
        """Begin at zero, around whatever stands in place of the forwards now."""
        self._spent = 0.0
        if self._before:
            return
        for module in self._projections:
            self._put(module, "forward", 1)
        # What the call takes without its inside is what lies around it.
        self._put(self._base, "apply_model", 1)
        self._put(self._base, "_apply_model", -1)

    def read(self) -> float:
        """Seconds since the start."""
        return self._spent

    def remove(self) -> None:
        """Put everything back as it was."""
        for thing, name, before in reversed(self._before):
            if before is None:
                del thing.__dict__[name]
            else:
                thing.__dict__[name] = before
        self._before = []

    def _put(self, thing: Any, name: str, sign: int) -> None:
        inner = getattr(thing, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return inner(*arguments, **named)
            finally:
                self._spent += sign * (time.process_time() - start)

        self._before.append((thing, name, thing.__dict__.get(name)))
        thing.__dict__[name] = timed


if __name__ == "__main__":
    sys.exit(main())
