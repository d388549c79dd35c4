"""What all tiers share. Tiers are folders: method, host, fake_cuda, server, browser, demo, dev."""

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
TESTS = ROOT / "tests"
# What computes: `dev.py test` runs it a second time with other instructions and threads.
NUMERIC = (
    "method/gated",
    "method/masks",
    "method/closed_form",
    "method/modules/test_cost_and_precision.py",
    "method/modules/test_embedding.py",
    "method/modules/test_merging.py",
    "method/modules/test_projections.py",
    "method/modules/test_training.py",
    "method/training",
    "host/injection/test_twin_lock.py",
    "host/models/test_native_loss.py",
    "host/text/test_covariance.py",
    "host/training/test_precision.py",
    "host/training/test_view.py",
    "host/test_frozen_files.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """The marker that names what computes."""
    line = "numeric: computes, and runs a second time as another processor would (dev/testing.py)"
    config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `NUMERIC` lists."""
    for item in items:
        place = item.path.relative_to(TESTS).as_posix()
        if any(place == each or place.startswith(f"{each}/") for each in NUMERIC):
            item.add_marker("numeric")


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
