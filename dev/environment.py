"""The virtual environment `.venv`: made once, checked by a fingerprint of what went into it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from .pip import run_pip
from .report import Failure, require_space, say

# The one combination of the three that installs from PyPI and imports together everywhere.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
OLDEST, NEWEST = (3, 11), (3, 14)  # for which this torch has been published
ROOM_GB = 9.0 if sys.platform == "linux" else 3.0  # torch brings the CUDA libraries on Linux


def venv_python(venv: Path) -> Path:
    """Where a virtual environment keeps its interpreter."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def ensure_venv(venv: Path) -> Path:
    """Make the virtual environment with the running Python, or adopt the one that is there.

    Returns its interpreter.
    """
    python = venv_python(venv)
    if not _has_pip(python):
        _require_supported(sys.version_info[:2], sys.executable)
        require_space(venv.parent, ROOM_GB, "torch and ComfyUI's packages")
        say(f"Making a virtual environment in {venv}")
        made = subprocess.run(
            [sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True
        )
        if made.returncode != 0 or not _has_pip(python):
            text = made.stdout + made.stderr
            if "ensurepip is not available" in text:
                raise Failure(
                    f"This Python ({sys.executable}) cannot make virtual environments; on Debian "
                    "or Ubuntu install its missing part with: apt install python3-venv"
                )
            reason = text.strip().splitlines()[-1:] or ["it gave no reason"]
            raise Failure(f"The virtual environment {venv} could not be made: {reason[0]}")
    _require_supported(_version(python), str(python))
    return python


def _require_supported(version: tuple[int, int], where: str) -> None:
    if not OLDEST <= version <= NEWEST:
        raise Failure(
            f"{TORCH[0]} exists for Python {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]} and "
            f"{where} is Python {version[0]}.{version[1]}; run dev.py with one of those (and "
            "remove the folder .venv if there is one)."
        )


def _has_pip(python: Path) -> bool:
    if not python.exists():
        return False
    return (
        subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0
    )


def _version(python: Path) -> tuple[int, int]:
    code = "import sys; print(*sys.version_info[:2])"
    out = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=True
    ).stdout
    major, minor = out.split()
    return int(major), int(minor)


def ensure_packages(
    venv: Path, python: Path, requirement_files: list[Path], name: str, cache: Path
) -> None:
    """Install the torch triple and the requirement files, unless this very set is there already.

    `name` tells the sets of one environment apart ("run", "test"); pip leaves alone what is
    already satisfied, so an environment made by hand is adopted in seconds.
    """
    contents = [file.read_text(encoding="utf-8") for file in requirement_files]
    fingerprint = hashlib.sha256(json.dumps([TORCH, contents]).encode()).hexdigest()
    marker = venv / "perfusion-packages.json"
    done: dict[str, str] = json.loads(marker.read_text("utf-8")) if marker.exists() else {}
    if done.get(name) == fingerprint:
        return
    if not _installed(python, "torch"):
        require_space(venv, ROOM_GB, "torch and ComfyUI's packages")
        say("Installing torch and ComfyUI's packages (once; up to 6 GB on Linux, a few minutes)")
    else:
        say("Checking the installed packages")
    arguments = ["install", *TORCH]
    for file in requirement_files:
        arguments += ["-r", str(file)]
    run_pip(python, arguments, "installing the packages", cache / f"pip-{name}.log")
    marker.write_text(json.dumps({**done, name: fingerprint}), encoding="utf-8")


def _installed(python: Path, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([str(python), "-c", code]).returncode == 0


def require_modules(python: Path, modules: list[str], remedy: str) -> None:
    """Check that a Python we did not set up has what we are about to import."""
    missing = [module for module in modules if not _installed(python, module)]
    if missing:
        raise Failure(f"{python} lacks {', '.join(missing)}: {remedy}")
