"""`dev.py test` runs what computes a second time, as another processor would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dev.testing import FOREIGN, runs_twice


@pytest.mark.parametrize(
    ("options", "twice"),
    [
        ([], True),
        (["tests/method", "-k", "gate"], True),
        (["-x", "--durations=5"], True),
        (["-m", "numeric"], False),
        (["--collect-only"], False),
    ],
)
def test_a_run_that_chooses_by_marker_or_only_lists_is_not_repeated(options, twice) -> None:
    assert runs_twice(options) is twice


def test_the_marker_holds_what_computes_and_nothing_else(repository: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "numeric"]
    done = subprocess.run(
        [*command, "tests/method", "tests/dev"], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert "tests/method/gated/test_rank_one.py" in files
    assert not any("tests/dev" in file or "test_architecture" in file for file in files)


def test_the_foreign_setting_reaches_torch(repository: Path) -> None:
    code = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **FOREIGN}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["DEFAULT", "4"], done.stderr
