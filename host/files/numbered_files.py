"""Free file names inside one of ComfyUI's model folders."""

from __future__ import annotations

from pathlib import Path

import folder_paths

EXTENSION = ".safetensors"


def check_prefix(folder: str, filename_prefix: str) -> Path:
    """The first place of a model folder, if a file of this prefix would lie inside it.

    Raises:
        ValueError: for a prefix that leaves the folder or names no file.
    """
    root = Path(folder_paths.get_folder_paths(folder)[0])
    inside = (root / filename_prefix).resolve()
    if (
        not inside.is_relative_to(root.resolve())
        or inside == root.resolve()
        or not filename_prefix.strip()
        or filename_prefix.endswith(("/", "\\"))
    ):
        raise ValueError(
            f"filename_prefix: expected a name inside {root}, found {filename_prefix!r}; use a "
            "name such as 'concepts/my_cat'"
        )
    return root


def prefix_problem(folder: str, filename_prefix: str | None) -> bool | str:
    """What a node's `validate_inputs` returns: True, or what is wrong with a prefix.

    One that comes over a wire is None then, and looked at when it is there.
    """
    if filename_prefix is None:
        return True
    try:
        check_prefix(folder, filename_prefix)
    except ValueError as error:
        return str(error)
    return True


def numbered_file(folder: str, filename_prefix: str) -> tuple[Path, str]:
    """The path of the next free number, and its name as a loader's menu shows it.

    `folder` is one of ComfyUI's model folders, such as "loras"; its first place is used.
    `filename_prefix` may name sub-folders and use ComfyUI's variables such as %year%.

    Raises:
        ValueError: for a prefix that leaves the folder or names no file.
    """
    root = check_prefix(folder, filename_prefix)
    place, name, number, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, str(root))
    file = f"{name}_{number:05}_{EXTENSION}"
    return Path(place) / file, (Path(subfolder) / file).as_posix()
