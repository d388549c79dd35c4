"""What all benchmarks share: interleaved timing, a table, a JSON file beside the scripts."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    synchronise: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each of `rounds` rounds, in turn, every second round backwards.

    Taking turns lets a slow spell of the machine hit all of them; compare medians, or the medians
    of ratios within one round. `synchronise` waits for a device that works on its own. `clock` may
    be `time.process_time`: on cores shared with anything else the processor time of one thread
    tells small differences that the clock on the wall does not.
    """
    wait = synchronise or (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(-warmup, rounds):
        for name in names if turn % 2 else reversed(names):
            wait()
            start = clock()
            candidates[name]()
            wait()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over the rounds of one candidate's time over another's."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if cuda else None,
    }


def write_results(
    name: str,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    families: Sequence[str] = (),
) -> Path:
    """Write benchmarks/results/<name>.json, with a family's name for a run of that one alone.

    Families need other sizes to fit into a machine. Returns the path.
    """
    RESULTS.mkdir(exist_ok=True)
    if len(families) == 1:
        name = f"{name}_{families[0]}"
    path = RESULTS / f"{name}.json"
    named = {key: _name(value) for key, value in settings.items()}
    content = {"machine": machine(), "settings": named, "rows": [dict(r) for r in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def _name(value: object) -> object:
    """A path as it is within the repository, whoever's folder that lies in."""
    root = RESULTS.parent.parent
    text = str(value)
    inside = Path(text).is_absolute() and Path(text).is_relative_to(root)
    return str(Path(text).relative_to(root)) if inside else value


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print `table` of rows."""
    print(table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table; numbers to four significant digits."""
    heads = list(rows[0])
    cells = [[_cell(row[head]) for head in heads] for row in rows]
    widths = [max(len(line[at]) for line in (heads, *cells)) for at in range(len(heads))]
    padded = (
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in (heads, ["-" * width for width in widths], *cells)
    )
    return "\n".join(f"| {line} |" for line in padded)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
