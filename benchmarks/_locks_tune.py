"""Choosing the settings of each way of `locks` on things that no table shows, by one rule.

Every way gets as many tries: four settings, then the best of them with more steps.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from demo.things import Look

from ._locks_kept import Deadline, weights_digest
from ._locks_measure import Bench
from ._report import RESULTS
from ._ways import Settings, Way

CHOSEN = RESULTS / "locks_tuned.json"
VALIDATION = (
    Look("mug", "teal", "cream", "maroon", pattern="halves"),
    Look("house", "lime", "maroon", "cream"),
    Look("cat", "mint", "navy", "teal", pattern="striped"),
)
"""Things that no table shows, one of two halves."""
GRIDS: Mapping[str, Sequence[Settings]] = {
    "twin_lock": [Settings(rate) for rate in (0.25, 0.125, 0.5, 0.0625)],
    "perfusion": [
        *(Settings(rate) for rate in (0.25, 0.125, 0.5)),
        Settings(0.25, vector_rate=0.3),
    ],
    "textual_inversion": [Settings(0.25, rate) for rate in (0.3, 1.0, 0.1, 3.0)],
    "lora": [Settings(rate) for rate in (0.003, 0.01, 0.001, 0.0003)],
    "lora_word": [Settings(rate) for rate in (0.003, 0.01, 0.001, 0.0003)],
}
"""Per mode; the best is then tried with more steps, too."""
LONGER = 2


def score(row: Mapping[str, float]) -> float:
    """Likeness in the right scene, less what leaks and what else changes.

    Likeness times scene, minus the leak where it is one, minus the change of pictures of other
    words as a part of what two pictures of one prompt from two noises differ by. Where the
    everyday word itself asks for the thing its leak is the likeness, and none is counted.
    """
    return max(row["likeness"], 0) * row["scene"] - max(row["leak"], 0) - row["others changed"]


def tune(bench: Bench, ways: Sequence[Way], things: Sequence[Look], deadline: Deadline) -> None:
    """Choose the settings of each way, going on from what was tried on the same weights."""
    found = read_tuned()
    found.setdefault("ways", {})
    for mode in dict.fromkeys(way.mode for way in ways):
        of_mode = [way for way in ways if way.mode == mode]
        tried: dict[str, list[dict[str, Any]]] = {
            way.name: found["ways"].get(way.name, {}).get("tried", []) for way in of_mode
        }
        for settings in GRIDS[mode]:
            try_settings(bench, of_mode, things, settings, tried, found, deadline)
        longer = {way.name: longest(best(tried[way.name])) for way in of_mode if tried[way.name]}
        for way in of_mode:
            if way.name in longer:
                try_settings(bench, [way], things, longer[way.name], tried, found, deadline)
        bench.forget()


def longest(settings: Settings) -> Settings:
    """The same with more steps."""
    return replace(settings, steps=round(Settings(0.0).steps * LONGER))


def try_settings(
    bench: Bench,
    ways: Sequence[Way],
    things: Sequence[Look],
    settings: Settings,
    tried: Mapping[str, list[dict[str, Any]]],
    found: dict[str, Any],
    deadline: Deadline,
) -> None:
    """Add what settings give to what was tried of each way, and write it down."""
    for way in ways:
        if any(of_row(row) == settings for row in tried[way.name]) or deadline.passed():
            continue
        each = [one_try(bench, way, thing, settings) for thing in things]
        means = {name: statistics.mean(row[name] for row in each) for name in each[0]}
        row = {**asdict(settings), **{name: round(mean, 3) for name, mean in means.items()}}
        row["score"] = round(score(means), 3)
        tried[way.name].append(row)
        found["ways"][way.name] = {
            "chosen": asdict(best(tried[way.name])),
            "tried": tried[way.name],
        }
        found["things"] = [asdict(thing) for thing in things]
        CHOSEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{way.name}: {json.dumps(row)}", flush=True)


def one_try(bench: Bench, way: Way, thing: Look, settings: Settings) -> dict[str, float]:
    """What settings give of one thing."""
    found = bench.singles(way, thing, settings, 0)
    own = bench.learned(way, thing, settings, 0)
    changed = bench.others(way, thing, own)["others apart"] / bench.unlike(thing)
    leak = 0.0 if way.mode == "lora" else bench.leak(way, thing, own)
    return {**found, "leak": leak, "others changed": changed}


def of_row(row: Mapping[str, Any]) -> Settings:
    """The settings that a row tells of."""
    return Settings(**{name: row[name] for name in asdict(Settings(0.0))})


def best(tried: Iterable[Mapping[str, Any]]) -> Settings:
    """The settings of the highest score; of equal ones the first."""
    return of_row(max(tried, key=lambda row: row["score"]))


def read_tuned() -> dict[str, Any]:
    """What was tried on today's weights; of others nothing counts."""
    found = json.loads(CHOSEN.read_text(encoding="utf-8")) if CHOSEN.exists() else {}
    digest = weights_digest()
    return found if found.get("weights") == digest else {"weights": digest}


def chosen(ways: Sequence[Way]) -> dict[str, Settings]:
    """What `tune` chose for each way, on whatever weights; else the first of its settings."""
    found = json.loads(CHOSEN.read_text(encoding="utf-8")) if CHOSEN.exists() else {}
    kept = found.get("ways", {})
    return {
        way.name: Settings(**kept[way.name]["chosen"]) if way.name in kept else GRIDS[way.mode][0]
        for way in ways
    }
