"""What `.comfyignore` leaves is a working pack: nothing that is published needs what is not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dev.base import PACK
from dev.client import Client
from dev.comfyui import Host
from dev.server import Server

MOST_BYTES = 16_000_000


def published(repository: Path) -> list[Path]:
    """The files the registry would take: those of git that `.comfyignore`, read as git would, does
    not name."""
    git = ["git", "-C", str(repository), "ls-files", "--cached", "--others"]
    own = set(_lines([*git, "--exclude-standard"]))
    ignored = set(_lines([*git, "--ignored", "--exclude-from=.comfyignore"]))
    files = [repository / name for name in sorted(own - ignored)]
    return [file for file in files if file.is_file() and not file.is_symlink()]


def _lines(command: list[str]) -> list[str]:
    done = subprocess.run([*command, "-z"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.split("\0") if line]


@pytest.fixture(scope="module")
def files(repository: Path) -> list[Path]:
    if shutil.which("git") is None or not (repository / ".git").exists():
        pytest.skip("this is no checkout of git")
    return published(repository)


def test_what_is_published_is_small_and_holds_no_developer_files(
    files: list[Path], repository: Path
) -> None:
    names = {file.relative_to(repository).as_posix() for file in files}
    assert {"__init__.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    first = {name.split("/")[0] for name in names}
    assert first.isdisjoint({"tests", "benchmarks", "dev", "dev.py", "research", ".ci", ".github"})
    assert sum(file.stat().st_size for file in files) < MOST_BYTES


def test_a_server_with_only_the_published_files_has_all_nodes_and_loads_the_small_world(
    files: list[Path], repository: Path, comfy_host: Host, comfy_server: Server, tmp_path: Path
) -> None:
    place = tmp_path / "custom_nodes" / PACK
    for name in ("models", "input", "output", "user", "temp"):
        (tmp_path / name).mkdir()
    for file in files:
        target = place / file.relative_to(repository)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)

    def ours(client: Client) -> set[str]:
        nodes = client.json("/object_info")
        return {name for name in nodes if name.startswith("Perfusion")}

    with Server(comfy_host, tmp_path, cpu=True) as server:
        assert ours(server.client) == ours(comfy_server.client)
        assert server.client.json("/workflow_templates")[PACK]
        run = server.client.run(
            {
                "1": {"class_type": "PerfusionDemoModel", "inputs": {}},
                "2": {
                    "class_type": "CLIPTextEncode",
                    "inputs": {"clip": ["1", 1], "text": "a photo of a cat"},
                },
                "3": {
                    "class_type": "EmptyLatentImage",
                    "inputs": {"width": 64, "height": 64, "batch_size": 1},
                },
                "4": {
                    "class_type": "KSampler",
                    "inputs": {
                        **{"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0]},
                        **{"latent_image": ["3", 0], "seed": 0, "steps": 1, "cfg": 1.0},
                        **{"sampler_name": "euler", "scheduler": "normal", "denoise": 1.0},
                    },
                },
                "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
                "6": {
                    "class_type": "SaveImage",
                    "inputs": {"images": ["5", 0], "filename_prefix": "published"},
                },
            }
        )
        assert run.status == "execution_success", run.error
        assert run.images("output")
