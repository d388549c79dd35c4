"""What `locks` keeps of a run, so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from demo.world import WEIGHTS

from ._locks_measure import Size
from ._report import RESULTS, write_results
from ._ways import Settings

Rows = list[dict[str, Any]]


class Deadline:
    """Some minutes from now on, or none."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def passed(self, needed: float = 0.0) -> bool:
        """Whether there is no more time for what takes so many seconds."""
        return self._end is not None and time.monotonic() + needed > self._end


def weights_digest() -> str:
    """Of what draws and of what judges."""
    found = hashlib.sha256()
    for name in ("small_world.safetensors", "judge.safetensors"):
        found.update((WEIGHTS / name).read_bytes())
    return found.hexdigest()[:16]


class Kept:
    """Rows of `locks`, written down one by one.

    A row is kept while the weights, the number of pictures and its way's settings are the same.
    """

    def __init__(self, size: Size, settings: Mapping[str, Settings]) -> None:
        self._says = {
            "weights": weights_digest(),
            **json.loads(json.dumps(asdict(size))),
            "chosen": {name: asdict(each) for name, each in settings.items()},
        }
        self.rows: Rows = self._read()

    def has(self, way: str, thing: str, vector: int) -> bool:
        """Whether a row is there."""
        at = way, thing, vector
        return any((row["way"], row["thing"], row["vector"]) == at for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keep one more."""
        self.rows.append(row)
        write_results("locks", self._says, self.rows)

    def complete(self, ways: Sequence[str]) -> Rows:
        """The rows of every thing and vector for which all ways have one."""
        measured: dict[tuple[str, int], set[str]] = {}
        for row in self.rows:
            measured.setdefault((row["thing"], row["vector"]), set()).add(row["way"])
        return [
            row
            for row in self.rows
            if row["way"] in ways and measured[row["thing"], row["vector"]] >= set(ways)
        ]

    def _read(self) -> Rows:
        path = RESULTS / "locks.json"
        if not path.exists():
            return []
        found = json.loads(path.read_text(encoding="utf-8"))
        before, now = found["settings"], self._says
        fixed = [name for name in now if name != "chosen"]
        if any(before.get(name) != now[name] for name in fixed):
            return []
        same = {
            name
            for name, settings in before["chosen"].items()
            if now["chosen"].get(name, settings) == settings
        }
        self._says["chosen"] = {**{n: before["chosen"][n] for n in same}, **now["chosen"]}
        return [row for row in found["rows"] if row["way"] in same]
