"""What all tiers share. Tiers are folders: method, host, server, browser, dev."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.client import Client
from dev.comfyui import Host, find_foreign_host
from dev.prepare import Layout, make_server
from dev.server import Server

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of the pack."""
    return ROOT


@pytest.fixture(scope="session")
def comfy_host() -> Host:
    """The real ComfyUI, run with the Python that runs the tests."""
    foreign = find_foreign_host(ROOT, os.environ)
    tree = foreign.comfyui if foreign else Layout(ROOT).comfyui
    if not (tree / "main.py").exists():
        pytest.fail(f"there is no ComfyUI in {tree}: run the tests with `python dev.py test`")
    return Host(tree, Path(sys.executable), ours=foreign is None)


@pytest.fixture(scope="session")
def comfy_server(comfy_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server with the pack, in a base directory of its own, as dev.py starts it."""
    base = tmp_path_factory.mktemp("comfyui-base")
    with make_server(comfy_host, Layout(ROOT), base) as server:
        yield server


@pytest.fixture
def client(comfy_server: Server) -> Client:
    """Talks HTTP and websocket to the server."""
    return comfy_server.client
