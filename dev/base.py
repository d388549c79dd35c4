"""The base directory a ComfyUI server runs in, with the pack linked into its custom_nodes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .report import Failure

PACK = "perfusion"  # the folder name under custom_nodes
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "demo-output", "tests", "benchmarks")


def ensure_base(base: Path, root: Path) -> Path:
    """Make the base directory's folders and put the pack `root` into it; returns `base`."""
    for name in ("custom_nodes", "models", "input", "output", "user", "temp"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link_pack(root, base / "custom_nodes" / PACK)
    return base


def link_pack(root: Path, place: Path) -> None:
    """Make `place` show the pack: a link where the system allows one, else a fresh copy."""
    if place.is_symlink() or _is_junction(place):
        if place.exists() and place.samefile(root):
            return
        place.unlink() if place.is_symlink() else place.rmdir()
    elif place.exists():
        if not (place / "dev.py").is_file():
            raise Failure(f"{place} is in the way and is not this pack: move it elsewhere.")
        shutil.rmtree(place)  # an earlier copy of ours
    if os.name == "nt":
        _junction_or_copy(root, place)
    else:
        place.symlink_to(root, target_is_directory=True)


def _is_junction(place: Path) -> bool:
    if os.name != "nt" or not os.path.lexists(place):
        return False
    mount_point = 0xA0000003  # IO_REPARSE_TAG_MOUNT_POINT
    return getattr(place.lstat(), "st_reparse_tag", 0) == mount_point


def _junction_or_copy(root: Path, place: Path) -> None:
    # A junction needs no privilege, unlike a symbolic link, but exists on NTFS only.
    try:
        import _winapi

        _winapi.CreateJunction(str(root), str(place))  # type: ignore[attr-defined]
    except OSError:
        shutil.copytree(root, place, ignore=NOT_COPIED)


def share_models(comfyui: Path, base: Path) -> Path:
    """Write a paths file that lets a server in `base` use the models of somebody's ComfyUI."""
    models = comfyui / "models"
    lines = ["host:", f"  base_path: '{models.as_posix()}'"]
    if models.is_dir():
        lines += [f"  {folder.name}: {folder.name}" for folder in sorted(models.iterdir())
                  if folder.is_dir()]  # fmt: skip
    file = base / "host_model_paths.yaml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
