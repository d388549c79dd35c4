"""Fresh checkouts to run dev.py in, as a newcomer would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RunDev = Callable[..., subprocess.CompletedProcess[str]]


def copy_developer_files(root: Path, target: Path) -> Path:
    """What dev.py needs of a checkout, without anything it set up."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copytree(root / "dev", target / "dev", ignore=shutil.ignore_patterns("__pycache__"))
    (target / "tests").mkdir()
    for name in ("dev.py", "requirements.txt", "tests/requirements.txt"):
        shutil.copy(root / name, target / name)
    return target


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    return copy_developer_files(repository, tmp_path / "checkout")


@pytest.fixture
def run_dev() -> RunDev:
    """Runs `dev.py` of a checkout in a process of its own, outside any ComfyUI of this machine."""

    def run(checkout: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if k != "COMFYUI_PATH" and "PIP_" not in k}
        return subprocess.run(
            [sys.executable, "dev.py", *arguments],
            cwd=checkout,
            env={**clean, "PIP_CONFIG_FILE": os.devnull, **environ},
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


@pytest.fixture
def assert_one_sentence() -> Callable[[subprocess.CompletedProcess[str], str], None]:
    """A failed command says one sentence on standard error: no traceback, status 1."""

    def check(done: subprocess.CompletedProcess[str], expected: str) -> None:
        assert done.returncode == 1, done.stdout + done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert expected in done.stderr
        assert "Traceback" not in done.stdout + done.stderr

    return check
