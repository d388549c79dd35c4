"""What each key lock, and what a user would take instead, makes of a personal thing.

    python dev.py bench locks --tune     # choose every way's rates and steps, on things not shown
    python dev.py bench locks [--full]   # the table, with what was chosen

Twin, local and global lock, textual inversion and ComfyUI's own Train LoRA are taught the same five
photographs of personal things of the small world. The judge says how much of the thing is in
pictures that ask for it, and what else changed:

    likeness     0: another of its kind, 1: the renderer's own pictures of it
    scene        share of pictures with the scene and style that were asked for
    leak         how much nearer to the thing its everyday word becomes
    others       mean difference of pictures of other words (0 to 255), and the share of equal ones
    pair         "on the left a <bo> and on the right a teddy" and the other way round: likeness of
                 the half that shall show the thing, and of the other half, which shall not
    two          two things taught apart in one picture: both kinds are there; likeness of either
    training s   processor time of the whole training; s per step is that over its steps

Everything is drawn from the same noise for every way. Another vector seed is another placeholder,
another order of pictures and other noise in training.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from demo.things import SUBJECTS, Look

from ._locks_measure import Bench, Size
from ._report import RESULTS, table, write_results
from ._ways import WAYS, Settings, Way

CHOSEN = RESULTS / "locks_tuned.json"
VALIDATION = (
    Look("house", "lime", "maroon", "cream"),
    Look("cat", "mint", "navy", "teal", pattern="striped"),
)
"""Things that no table shows: rates are chosen by them."""
SHOWN = ("Bo the teddy", "Olli the mug")
GRIDS: Mapping[str, Sequence[Settings]] = {
    "twin_lock": [Settings(rate) for rate in (0.125, 0.25, 0.5)],
    "perfusion": [
        *(Settings(rate) for rate in (0.125, 0.25, 0.5)),
        Settings(0.25, vector_rate=0.3),
    ],
    "textual_inversion": [Settings(0.25, rate) for rate in (0.3, 1.0, 3.0)],
    "lora": [Settings(rate) for rate in (0.001, 0.003, 0.01)],
}
"""Per mode; the best is then tried with more steps, too."""
LONGER = 8 / 3
SMALL = Size(prompts=(0, 2, 3, 5, 6), seeds=2, others=8, pairs=2)
FULL = Size(prompts=tuple(range(8)), seeds=4, others=14, pairs=4)


def main() -> int:
    """Tune, or measure, print the tables and write benchmarks/results/locks.json and .md."""
    options = parse()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    size = FULL if options.full else SMALL
    if options.seeds:
        size = replace(size, seeds=options.seeds)
    ways = [way for way in WAYS if way.mode in options.ways]
    if options.tune:
        size = replace(size, seeds=options.seeds or 2)
        tune(Bench(size), ways, VALIDATION[: options.validation])
        print(f"Wrote {CHOSEN}")
        return 0
    vectors = options.vectors or (3 if options.full else 1)
    used = chosen(ways)
    rows = measure(Bench(size), ways, options.things, vectors, used)
    settings = {
        **vars(options),
        **asdict(size),
        "vectors": vectors,
        "chosen": {way.name: asdict(used[way.name]) for way in ways},
    }
    path = write_results("locks", settings, rows)
    parts = [table(part) for part in (summary(rows), by_thing(rows)) if part]
    text = "\n\n".join([*parts, drawn(rows, size, vectors)]) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"{text}\nWrote {path} and {path.with_suffix('.md')}")
    return 0


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="dev.py bench locks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    modes = list(dict.fromkeys(way.mode for way in WAYS))
    parser.add_argument("--tune", action="store_true", help="choose rates and steps")
    parser.add_argument("--full", action="store_true", help="all prompts, 4 seeds, 3 vectors")
    parser.add_argument("--things", nargs="+", choices=SUBJECTS, metavar="THING")
    parser.add_argument("--ways", nargs="+", choices=modes, default=modes)
    parser.add_argument("--seeds", type=int, help="pictures of each prompt")
    parser.add_argument("--vectors", type=int, help="vector seeds")
    parser.add_argument("--validation", type=int, default=2, help="things to tune on")
    options = parser.parse_args()
    options.things = options.things or (SUBJECTS if options.full else list(SHOWN))
    return options


def tune(bench: Bench, ways: Sequence[Way], things: Sequence[Look]) -> None:
    """Choose the settings of each way by likeness times scene on the validation things."""
    found = json.loads(CHOSEN.read_text(encoding="utf-8")) if CHOSEN.exists() else {}
    for mode in dict.fromkeys(way.mode for way in ways):
        of_mode = [way for way in ways if way.mode == mode]
        tried: dict[str, list[dict[str, Any]]] = {way.name: [] for way in of_mode}
        for settings in GRIDS[mode]:
            try_settings(bench, of_mode, things, settings, tried)
        longer = {way.name: longest(best(tried[way.name])) for way in of_mode}
        for settings in dict.fromkeys(longer.values()):
            try_settings(bench, of_mode, things, settings, tried)
        for way in of_mode:
            kept = best(tried[way.name])
            print(f"{way.name}: {kept}", flush=True)
            found[way.name] = {"chosen": asdict(kept), "tried": tried[way.name]}
            CHOSEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def longest(settings: Settings) -> Settings:
    """The same with more steps."""
    return replace(settings, steps=round(settings.steps * LONGER))


def try_settings(
    bench: Bench,
    ways: Sequence[Way],
    things: Sequence[Look],
    settings: Settings,
    tried: Mapping[str, list[dict[str, Any]]],
) -> None:
    """Add what settings give to what was tried of each way."""
    for way in ways:
        likeness, scene = [], []
        for thing in things:
            found = bench.singles(way, thing, settings, 0)
            likeness.append(found["likeness"])
            scene.append(found["scene"])
        mean = statistics.mean(likeness), statistics.mean(scene)
        row = {**asdict(settings), "likeness": round(mean[0], 3), "scene": round(mean[1], 3)}
        print(f"{way.name}: {row}", flush=True)
        tried[way.name].append(row)


def best(tried: Iterable[Mapping[str, Any]]) -> Settings:
    """The settings with the most likeness in the right scene; of equal ones the first."""
    row = max(tried, key=lambda row: max(row["likeness"], 0) * row["scene"])
    return Settings(**{name: row[name] for name in asdict(Settings(0.0))})


def chosen(ways: Sequence[Way]) -> dict[str, Settings]:
    """What `tune` chose for each way."""
    found = json.loads(CHOSEN.read_text(encoding="utf-8")) if CHOSEN.exists() else {}
    missing = {way.mode for way in ways if way.name not in found}
    if missing:
        words = " ".join(sorted(missing))
        sys.exit(f"no rates are chosen yet: run `python dev.py bench locks --tune --ways {words}`")
    return {way.name: Settings(**found[way.name]["chosen"]) for way in ways}


def measure(
    bench: Bench,
    ways: Sequence[Way],
    things: Sequence[str],
    vectors: int,
    settings: Mapping[str, Settings],
) -> list[dict[str, Any]]:
    """A row for each way, thing and vector seed."""
    rows = []
    for seed in range(vectors):
        for at, thing in enumerate(things):
            second = things[(at + 1) % len(things)]
            for way in ways:
                row = bench.row(way, thing, second, settings[way.name], seed)
                print(json.dumps(row), flush=True)
                rows.append(row)
        bench.forget()
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The means of each way over things and vector seeds."""
    means = []
    for name in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == name]
        found: dict[str, Any] = {"way": name}
        for key in own[0]:
            if key not in ("way", "thing", "vector"):
                values = [row[key] for row in own if row[key] is not None]
                found[key] = round(statistics.mean(values), 3) if values else "-"
        found["bytes"] = round(found["bytes"])
        means.append(found)
    return means


def by_thing(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Likeness of each thing by each way, its range over the vector seeds, and twin minus LoRA."""
    names = list(dict.fromkeys(row["way"] for row in rows))
    twin, lora = (next(w.name for w in WAYS if w.mode == m) for m in ("twin_lock", "lora"))
    lines = []
    for thing in dict.fromkeys(row["thing"] for row in rows):
        line: dict[str, Any] = {"likeness": thing}
        means = {}
        for name in names:
            own = [r["likeness"] for r in rows if r["thing"] == thing and r["way"] == name]
            means[name] = statistics.mean(own)
            spread = f" ({min(own):.2f} to {max(own):.2f})" if len(own) > 1 else ""
            line[name] = f"{means[name]:.2f}{spread}"
        if twin in means and lora in means:
            line["twin lock - LoRA"] = f"{means[twin] - means[lora]:+.2f}"
        lines.append(line)
    return lines


def drawn(rows: Sequence[Mapping[str, Any]], size: Size, vectors: int) -> str:
    """How many pictures the figures rest on."""
    things = len({row["thing"] for row in rows})
    counts = {
        "settings": len(size.prompts) * size.seeds,
        "other words": size.others,
        "pairs in each order": size.pairs * size.seeds,
    }
    per = ", ".join(f"{count} pictures of {what}" for what, count in counts.items())
    return f"{things} things x {vectors} vector seeds; for each way and each of these {per}."


if __name__ == "__main__":
    sys.exit(main())
