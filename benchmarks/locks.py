"""What each key lock, and what a user would take instead, makes of a personal thing.

    python dev.py bench locks --tune [--minutes 25]     # choose every way's rates and steps
    python dev.py bench locks [--minutes 35]            # the table, with what was chosen

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

It takes things in turn, each by every way, with one vector seed and then with the next; the table
is of those that all ways have been through. What is measured is kept: the same command after an
interruption, or after --minutes have passed, goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from demo.things import SUBJECTS

from ._locks_kept import Deadline, Kept
from ._locks_measure import Bench, Size
from ._locks_tune import CHOSEN, VALIDATION, chosen, tune
from ._report import RESULTS, table
from ._ways import WAYS, Settings, Way

SHOWN = ("Bo the teddy", "Olli the mug")
"""The first of the things."""
TUNING = Size(prompts=(0, 2, 3, 5, 6), seeds=2, others=8, pairs=0, pair_seeds=0)
WHOLE = Size(prompts=tuple(range(8)), seeds=4, others=14, pairs=4, pair_seeds=2)
VECTORS = 3


def main() -> int:
    """Tune, or measure, print the tables and write benchmarks/results/locks.json and .md."""
    options = parse()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    ways = [way for way in WAYS if way.mode in options.ways]
    deadline = Deadline(options.minutes)
    size = TUNING if options.tune else WHOLE
    if options.seeds:
        size = replace(size, seeds=options.seeds, pair_seeds=min(options.seeds, size.pair_seeds))
    if options.tune:
        tune(Bench(size), ways, VALIDATION[: options.validation], deadline)
        print(f"Wrote {CHOSEN}")
        return 0
    settings = chosen(ways)
    kept = Kept(size, settings)
    measure(Bench(size), ways, options.things, options.vectors, settings, kept, deadline)
    rows = kept.complete([way.name for way in ways])
    if not rows:
        print("No thing has been through all ways yet: run it again to go on.")
        return 0
    path = RESULTS / "locks.md"
    text = "\n\n".join([table(summary(rows)), table(by_thing(rows)), drawn(rows, size)]) + "\n"
    path.write_text(text, encoding="utf-8")
    print(f"{text}\nWrote {path} and locks.json beside it")
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
    parser.add_argument("--minutes", type=float, help="begin nothing that would take longer")
    others = [thing for thing in SUBJECTS if thing not in SHOWN]
    parser.add_argument(
        *("--things",), nargs="+", choices=SUBJECTS, default=[*SHOWN, *others], metavar="THING"
    )
    parser.add_argument("--ways", nargs="+", choices=modes, default=modes)
    parser.add_argument("--seeds", type=int, help="pictures of each prompt")
    parser.add_argument("--vectors", type=int, default=VECTORS, help="vector seeds")
    parser.add_argument("--validation", type=int, default=3, help="things to tune on")
    return parser.parse_args()


def measure(
    bench: Bench,
    ways: Sequence[Way],
    things: Sequence[str],
    vectors: int,
    settings: Mapping[str, Settings],
    kept: Kept,
    deadline: Deadline,
) -> None:
    """Add a row for each way, thing and vector seed that has none, while there is time."""
    longest = 0.0
    for seed in range(vectors):
        for at, thing in enumerate(things):
            second = things[(at + 1) % len(things)]
            for way in ways:
                if kept.has(way.name, thing, seed):
                    continue
                if deadline.passed(longest):
                    return
                started = time.monotonic()
                row = bench.row(way, thing, second, settings[way.name], seed)
                longest = max(longest, time.monotonic() - started)
                print(json.dumps(row), flush=True)
                kept.add(row)
        bench.forget()


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


def drawn(rows: Sequence[Mapping[str, Any]], size: Size) -> str:
    """How many pictures the figures rest on."""
    trained = len({(row["thing"], row["vector"]) for row in rows})
    things = len({row["thing"] for row in rows})
    counts = {
        "settings": len(size.prompts) * size.seeds,
        "other words": size.others,
        "pairs in each order": size.pairs * size.pair_seeds,
    }
    per = ", ".join(f"{count} pictures of {what}" for what, count in counts.items())
    return (
        f"{things} things, {trained} pairs of a thing and a vector seed; for each way and each of "
        f"these pairs {per}."
    )


if __name__ == "__main__":
    sys.exit(main())
