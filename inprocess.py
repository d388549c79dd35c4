"""Load this pack inside a Python process the way ComfyUI's own loader does it.

For tests, benchmarks and the demo's trainer; not part of the published pack. ComfyUI is taken from
`COMFYUI_PATH`, from the ComfyUI whose `custom_nodes` folder this checkout sits in, or from the
ignored folder `.comfyui/ComfyUI` that `dev.py` fills.

    from inprocess import load_pack
    pack = load_pack()
    from comfyui_perfusion.host.models import families
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = "comfyui_perfusion"
ROOT = Path(__file__).resolve().parent


def comfyui_path() -> Path:
    """The folder of the ComfyUI to use.

    Raises:
        RuntimeError: when there is none, with the places that were looked at and the remedy.
    """
    places = [ROOT / ".comfyui" / "ComfyUI"]
    if ROOT.parent.name == "custom_nodes":
        places.insert(0, ROOT.parent.parent)
    if os.environ.get("COMFYUI_PATH"):
        places = [Path(os.environ["COMFYUI_PATH"])]
    for place in places:
        if (place / "comfy" / "model_patcher.py").is_file():
            return place.resolve()
    looked = ", ".join(str(place) for place in places)
    raise RuntimeError(
        f"no ComfyUI found (looked at {looked}); set COMFYUI_PATH or run `python dev.py serve` once"
    )


def load_pack() -> ModuleType:
    """Import ComfyUI (on the CPU where there is no CUDA device) and this pack; idempotent.

    Returns the pack's root module, which is `comfyui_perfusion` in `sys.modules`.
    """
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    _import_comfyui()
    spec = importlib.util.spec_from_file_location(
        PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{ROOT / '__init__.py'} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[PACKAGE]
        raise
    return module


def _import_comfyui() -> None:
    # First on the path: this repository has a folder `nodes/` of its own, and a plain
    # `import nodes` must find ComfyUI's module.
    tree = str(comfyui_path())
    if tree in sys.path:
        sys.path.remove(tree)
    sys.path.insert(0, tree)

    import torch

    # ComfyUI reads its options from sys.argv when it is first imported.
    argv = sys.argv
    sys.argv = [argv[0], *([] if torch.cuda.is_available() else ["--cpu"])]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = argv
