"""What `pip install .` installs: the method alone, usable without ComfyUI."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel pip builds of this folder (from a copy, so that nothing is left in it)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py"):
        shutil.copy(repository / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("perfusion", "host", "nodes"):
        shutil.copytree(repository / name, source / name, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", out, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("perfusion-*.whl")
    return built


def test_the_wheel_holds_the_method_and_nothing_of_the_node_pack(wheel, repository):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    root = repository / "perfusion"
    method = {f"perfusion/{path.relative_to(root).as_posix()}" for path in root.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == method
    assert all(name.startswith("perfusion/") for name in names)


def test_the_installed_package_works_away_from_the_repository(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import torch, perfusion\n"
        f"assert perfusion.__file__.startswith({str(tmp_path)!r}), perfusion.__file__\n"
        "from perfusion import Rank1EditModule\n"
        "module = Rank1EditModule(torch.nn.Linear(8, 4, bias=False), is_key_proj=True)\n"
        "text = torch.randn(2, 5, 8)\n"
        "module(text, concept_indices=torch.tensor([1, 2]), text_enc_with_superclass=text)\n"
        "assert module.eval()(text).shape == (2, 5, 4)\n"
        "assert 'comfy' not in sys.modules and 'open_clip' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
