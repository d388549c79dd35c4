"""Brings the folders beside dev.py to the state in which a command can run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .base import ensure_base, share_models
from .comfyui import Host, ensure_comfyui, find_foreign_host
from .environment import ensure_packages, ensure_venv, require_modules
from .report import say
from .server import Server


@dataclass(frozen=True)
class Layout:
    """Where things are, all under the repository's root."""

    root: Path

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def comfyui(self) -> Path:
        return self.root / ".comfyui" / "ComfyUI"

    @property
    def base(self) -> Path:
        return self.root / ".comfyui" / "base"

    @property
    def cache(self) -> Path:
        return self.root / ".cache"


def prepare(layout: Layout, with_tests: bool = False) -> Host:
    """Set up what is missing, saying so, and return the ComfyUI to use."""
    test_requirements = layout.root / "tests" / "requirements.txt"
    host = find_foreign_host(layout.root, os.environ)
    if host is not None:
        say(f"Using the ComfyUI in {host.comfyui} with {host.python}")
        install = f"install its packages with: {host.python} -m pip install -r"
        require_modules(
            host.python, ["torch", "aiohttp"], f"{install} {host.comfyui / 'requirements.txt'}"
        )
        if with_tests:
            require_modules(host.python, ["pytest", "pytest_timeout", "playwright", "ruff"],
                            f"{install} {test_requirements}")  # fmt: skip
        return host
    python = ensure_venv(layout.venv)
    ensure_comfyui(layout.comfyui, python, layout.cache)
    requirements = [layout.comfyui / "requirements.txt", layout.root / "requirements.txt"]
    if with_tests:
        ensure_packages(
            layout.venv, python, [*requirements, test_requirements], "test", layout.cache
        )
    else:
        ensure_packages(layout.venv, python, requirements, "run", layout.cache)
    return Host(layout.comfyui, python, ours=True)


def make_server(
    host: Host,
    layout: Layout,
    base: Path | None = None,
    port: int | None = None,
    cpu: bool = False,
) -> Server:
    """A server (not started yet) with the pack, in our base directory unless another is given.

    Somebody's own ComfyUI lends its models; nothing is written into its folders.
    """
    base = ensure_base(base or layout.base, layout.root)
    extra: list[str] = []
    if not host.ours:
        extra = ["--extra-model-paths-config", str(share_models(host.comfyui, base))]
    return Server(host, base, port, extra, cpu)
