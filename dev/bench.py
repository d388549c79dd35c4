"""`python dev.py bench <name>`: runs `benchmarks/<name>.py` with the environment's Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from .prepare import Layout, prepare


def bench_names(root: Path) -> list[str]:
    """The benchmarks there are; files that start with an underscore are shared by them."""
    files = (root / "benchmarks").glob("*.py")
    return sorted(file.stem for file in files if not file.stem.startswith("_"))


def bench(layout: Layout, name: str, options: list[str]) -> int:
    """Run one benchmark, which prints its table and writes benchmarks/results/<name>.json.

    `options` go to the benchmark itself; returns its exit status.
    """
    host = prepare(layout, with_tests=True)
    environment = {**os.environ, "COMFYUI_PATH": str(host.comfyui)}
    command = [str(host.python), "-m", f"benchmarks.{name}", *options]
    return subprocess.run(command, cwd=layout.root, env=environment).returncode
