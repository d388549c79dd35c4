"""Somebody's own ComfyUI is found and used; ours is set up once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dev import comfyui, environment
from dev.base import PACK, ensure_base, share_models
from dev.report import Failure


def tree_at(place: Path) -> Path:
    """The files by which a ComfyUI is recognised."""
    (place / "comfy").mkdir(parents=True)
    (place / "main.py").touch()
    (place / "comfy" / "model_patcher.py").touch()
    return place


def python_at(venv: Path) -> Path:
    python = environment.venv_python(venv)
    python.parent.mkdir(parents=True)
    python.touch()
    return python


def test_without_a_comfyui_around_there_is_none_to_use(tmp_path: Path) -> None:
    assert comfyui.find_foreign_host(tmp_path / "pack", {}) is None


def test_the_comfyui_the_pack_sits_in_is_used(tmp_path: Path) -> None:
    tree = tree_at(tmp_path / "ComfyUI")
    host = comfyui.find_foreign_host(tree / "custom_nodes" / "pack", {})
    assert host is not None
    assert host.comfyui == tree
    assert not host.ours


def test_a_folder_called_custom_nodes_alone_is_not_a_comfyui(tmp_path: Path) -> None:
    assert comfyui.find_foreign_host(tmp_path / "custom_nodes" / "pack", {}) is None


def test_comfyui_path_wins_over_the_place_of_the_pack(tmp_path: Path) -> None:
    around, named = tree_at(tmp_path / "around"), tree_at(tmp_path / "named")
    environ = {"COMFYUI_PATH": str(named)}
    host = comfyui.find_foreign_host(around / "custom_nodes" / "pack", environ)
    assert host is not None
    assert host.comfyui == named.resolve()


@pytest.mark.parametrize("place", ["ComfyUI/venv", "ComfyUI/.venv", ".venv"])
def test_a_comfyui_runs_with_its_own_environment(tmp_path: Path, place: str) -> None:
    tree = tree_at(tmp_path / "ComfyUI")
    assert comfyui.find_python(tree) == Path(sys.executable)
    python = python_at(tmp_path / place)
    assert comfyui.find_python(tree) == python


def test_the_windows_portable_build_runs_with_its_embedded_python(tmp_path: Path) -> None:
    tree = tree_at(tmp_path / "ComfyUI")
    python = tmp_path / "python_embeded" / "python.exe"
    python.parent.mkdir()
    python.touch()
    assert comfyui.find_python(tree) == python


def test_a_wrong_comfyui_path_is_one_sentence(
    checkout: Path, tmp_path: Path, run_dev, assert_one_sentence
) -> None:
    done = run_dev(checkout, "demo", COMFYUI_PATH=str(tmp_path / "nowhere"))
    assert_one_sentence(done, "which is not a ComfyUI")
    assert not (checkout / ".venv").exists()


def test_a_comfyui_without_its_packages_is_told_how_to_get_them(
    checkout: Path, tmp_path: Path, run_dev, assert_one_sentence
) -> None:
    tree = tree_at(tmp_path / "ComfyUI")
    bare = tmp_path / "ComfyUI" / "venv"
    import venv

    venv.create(bare, symlinks=sys.platform != "win32")
    done = run_dev(checkout, "demo", COMFYUI_PATH=str(tree))
    assert_one_sentence(done, "lacks torch, aiohttp: install its packages with")
    assert not (checkout / ".venv").exists()


def test_packages_whose_fingerprint_is_recorded_are_not_looked_at_again(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("")
    python = Path(sys.executable)  # has everything already, so pip leaves it alone
    environment.ensure_packages(tmp_path, python, [requirements], "run", tmp_path / "cache")
    assert (tmp_path / "cache" / "pip-run.log").exists()
    nowhere = tmp_path / "no-python"
    environment.ensure_packages(tmp_path, nowhere, [requirements], "run", tmp_path / "cache")
    requirements.write_text("# changed")
    with pytest.raises(FileNotFoundError):
        environment.ensure_packages(tmp_path, nowhere, [requirements], "run", tmp_path / "cache")


def test_the_pack_is_linked_once_and_a_stale_link_is_renewed(
    tmp_path: Path, repository: Path
) -> None:
    base = ensure_base(tmp_path / "base", tmp_path)
    for _ in range(2):
        ensure_base(base, repository)
        assert (base / "custom_nodes" / PACK / "dev.py").samefile(repository / "dev.py")
    assert (repository / "dev.py").exists()


def test_a_stranger_in_the_place_of_the_link_is_left_alone(
    tmp_path: Path, repository: Path
) -> None:
    stranger = tmp_path / "custom_nodes" / PACK
    stranger.mkdir(parents=True)
    (stranger / "work.txt").write_text("precious")
    with pytest.raises(Failure, match="is in the way"):
        ensure_base(tmp_path, repository)
    assert (stranger / "work.txt").exists()


def test_models_of_somebodys_comfyui_are_offered_to_our_base_directory(tmp_path: Path) -> None:
    (tmp_path / "ComfyUI" / "models" / "loras").mkdir(parents=True)
    (tmp_path / "base").mkdir()
    text = share_models(tmp_path / "ComfyUI", tmp_path / "base").read_text()
    assert f"base_path: '{(tmp_path / 'ComfyUI' / 'models').as_posix()}'" in text
    assert "  loras: loras" in text
