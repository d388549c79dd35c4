"""Pack all that training needs into one folder: ``python -m demo.train_bundle FOLDER``.

For a bare machine with a GPU, PyTorch and no network. The folder holds this repository's code,
those files of ComfyUI that training loads, and the pure-Python packages among its dependencies that
such a machine may lack. There, from the folder: ``sh train.sh --minutes 9``, again and again until
``weights`` is full; the state in between is in ``cache``.
"""

import argparse
import importlib
import logging
import shutil
import sys
from pathlib import Path

from inprocess import ROOT, comfyui_path, load_pack

load_pack()

log = logging.getLogger("demo.train")
PROVIDED = (
    "torch torchvision torchaudio torchgen pip setuptools _distutils_hack mpmath opt_einsum "
    "sentencepiece numpy PIL safetensors transformers tokenizers einops tqdm psutil yaml "
    "requests scipy regex packaging filelock huggingface_hub sympy networkx jinja2 "
    "typing_extensions aiohttp yarl multidict attr attrs pydantic triton"
)
"""Import names that the other machine has of its own."""
STUBS = ("av",)
"""Compiled packages that ComfyUI imports and training never uses: an empty name in their place."""
CODE = ("demo", "host", "perfusion", "nodes", "inprocess.py", "__init__.py")
_STUB = """import sys
import types


class _Absent(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


_names = "|.container|.subtitles|.subtitles.stream|.codec|.error|.video|.video.reformatter"
for _name in _names.split("|"):
    sys.modules[__name__ + _name] = _Absent(__name__ + _name)
"""
_START = """#!/bin/sh
# Runs or goes on with the training; arguments are those of demo.train.
cd "$(dirname "$0")" || exit 1
export COMFYUI_PATH="$PWD/ComfyUI" PYTHONPATH="$PWD/packages"
exec python3 -m demo.train --cache "${CACHE:-cache}" --weights "${WEIGHTS:-weights}" "$@"
"""


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        ignore = shutil.ignore_patterns(
            "__pycache__", "*.pyc", "*.so*", "cache", "weights", "concepts"
        )
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignore)
    else:
        shutil.copyfile(source, target)


def bundle(folder: Path, provided: list[str]) -> int:
    """Fill ``folder``; returns its size in bytes."""
    importlib.import_module("demo.train")
    importlib.import_module("torch._dynamo")
    comfy = comfyui_path()
    for name in CODE:
        _copy(ROOT / name, folder / name)
    files = {
        Path(file).resolve()
        for module in list(sys.modules.values())
        if (file := getattr(module, "__file__", None))
    }
    for path in files:
        if path.is_relative_to(comfy):
            _copy(path, folder / "ComfyUI" / path.relative_to(comfy))
    for pattern in ("comfy/*.json", "comfy/sd1_tokenizer/*", "comfy/model_patcher.py"):
        for path in comfy.glob(pattern):
            _copy(path, folder / "ComfyUI" / path.relative_to(comfy))
    for name in {name.partition(".")[0] for name in sys.modules}:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if not file or "site-packages" not in file or name in (*provided, *STUBS):
            continue
        path = Path(file)
        if path.suffix != ".py":
            log.warning("%s is compiled and stays behind", name)
        elif path.name == "__init__.py":
            _copy(path.parent, folder / "packages" / name)
        else:
            _copy(path, folder / "packages" / path.name)
    for name in STUBS:
        (folder / "packages" / f"{name}.py").write_text(_STUB, encoding="utf-8")
    (folder / "train.sh").write_text(_START, encoding="utf-8")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Make the folder anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--provided", nargs="*", default=PROVIDED.split())
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    if arguments.folder.exists():
        raise SystemExit(f"{arguments.folder} exists; name a folder that does not")
    size = bundle(arguments.folder, arguments.provided)
    log.info("%s: %.1f MB", arguments.folder, size / 1e6)


if __name__ == "__main__":
    main()
