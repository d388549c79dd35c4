"""Where concept files live: the `perfusion` folder below ComfyUI's models."""

from __future__ import annotations

from pathlib import Path

import folder_paths

FOLDER = "perfusion"
EXTENSION = ".safetensors"


def register_folder() -> None:
    """Make `models/perfusion` known to ComfyUI (extra_model_paths.yaml may add more)."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*extensions, EXTENSION})
