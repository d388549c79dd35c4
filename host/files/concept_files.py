"""Where concept files live: the `perfusion` folder below ComfyUI's models."""

from __future__ import annotations

from pathlib import Path

import comfyui_version
import folder_paths
import torch

from ...perfusion.concept.concept import Concept
from ...perfusion.concept.concept_file import load_concept, save_concept
from ...perfusion.concept.metadata import with_origin
from .numbered_files import EXTENSION, numbered_file

FOLDER = "perfusion"
SHIPPED = Path(__file__).parents[2] / "demo" / "concepts"


def register_folder() -> None:
    """Make `models/perfusion` known to ComfyUI (extra_model_paths.yaml may add more).

    The demo's ready-made concepts are listed besides; new ones go into the first folder.
    """
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    folder_paths.add_model_folder_path(FOLDER, str(SHIPPED))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*extensions, EXTENSION})


def concept_names() -> list[str]:
    """Every concept file, with its sub-folder, as a loader's menu shows them."""
    names = folder_paths.get_filename_list(FOLDER)
    return [name for name in names if name.lower().endswith(EXTENSION)]


def concept_path(name: str) -> Path:
    """The file of a name from `concept_names`.

    Raises:
        FileNotFoundError: when there is no such file inside the concept folders.
    """
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None or not name.lower().endswith(EXTENSION):
        folders = ", ".join(folder_paths.get_folder_paths(FOLDER))
        raise FileNotFoundError(
            f"there is no concept file {name!r} in {folders}; train it, or ask whoever made the "
            "workflow for the file, put it there (or drop it on the page) and choose it"
        )
    return Path(path)


def read_concept(name: str) -> Concept:
    """Load the concept file of a name from `concept_names`."""
    return load_concept(concept_path(name))


def fingerprint(name: str) -> str:
    """Changes whenever the file does."""
    status = concept_path(name).stat()
    return f"{status.st_mtime_ns} {status.st_size}"


def signed(concept: Concept, images_hash: str = "") -> Concept:
    """A newly trained concept that says which programs made it, and of which pictures."""
    versions = {"ComfyUI": comfyui_version.__version__, "torch": torch.__version__}
    return with_origin(concept, versions, images_hash)


def write_concept(concept: Concept, filename_prefix: str) -> tuple[str, int]:
    """Save a concept under the next free number; returns its name and its size in bytes.

    `filename_prefix` may name sub-folders and use ComfyUI's variables such as %year%.

    Raises:
        ValueError: for a prefix that leaves the concept folder or names no file.
    """
    path, name = numbered_file(FOLDER, filename_prefix)
    return name, save_concept(concept, path).stat().st_size
