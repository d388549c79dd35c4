"""The one-way rule, for layers (nodes -> host -> perfusion) and for the rooms inside them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = ("perfusion", "host", "nodes", "demo")
# Relative imports become absolute under this name, so that they differ from ComfyUI's modules.
PACK = "pack"
FORBIDDEN = {
    "perfusion": (
        *(f"{PACK}.{layer}" for layer in ("host", "nodes", "demo")),
        *("host", "nodes", "demo", "comfy", "comfy_api", "comfy_extras", "folder_paths"),
        *("execution", "server", "model_management", "inprocess"),
    ),
    "host": (f"{PACK}.nodes", "comfyui_perfusion.nodes", "nodes"),
    "nodes": ("comfy", "comfy_extras", "nodes"),
    "demo": (f"{PACK}.nodes", "comfyui_perfusion.nodes", "nodes"),
}
# Every room and the rooms of its own layer that it may import. A room may only name rooms above
# it, so arrows point one way.
ROOMS = {
    "perfusion": {
        "files": (),
        "text": (),
        "gated": ("files",),
        "masks": (),
        "concept": ("files", "text", "gated"),
        "closed_form": ("text", "gated"),
        "training": ("files", "text", "gated", "concept"),
        "modules": ("gated", "concept", "training"),
    },
    "host": {
        "interface": (),
        "models": (),
        "files": (),
        "text": ("interface", "models"),
        "injection": ("interface", "models", "text"),
        "pictures": ("interface", "models", "text", "injection"),
        "closed_form": ("files", "models", "text"),
        "training": ("files", "interface", "models", "text", "injection", "pictures"),
    },
}
METHOD_NEEDS = {"torch", "einops", "safetensors"}
# Of use where it is installed; imported inside of the function that uses it, never at the top.
METHOD_MAY_USE = {"perfusion/modules/embedding.py": {"open_clip"}}
# The trainer of the small world runs from a developer's shell and is not published.
PUBLISHED_EXCEPT = {"demo/train.py", "demo/train_bundle.py"}
UNSAFE_CALLS = {"eval", "exec", "__import__", "import_module"}
UNSAFE_MODULES = ("subprocess", "pickle", "requests", "urllib", "socket", "http", "ctypes")


def sources(repository: Path, layer: str) -> list[Path]:
    return sorted((repository / layer).rglob("*.py"))


def imports(repository: Path, path: Path) -> Iterator[str]:
    """Every module a file imports, at whatever depth in the file, by its absolute name."""
    package = [PACK, *path.relative_to(repository).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from .. import nodes` imports a module too.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def test_the_import_reader_sees_every_way_to_import(tmp_path):
    folder = tmp_path / "host"
    folder.mkdir()
    file = folder / "a.py"
    file.write_text(
        "import nodes\nfrom .. import nodes\nfrom ..nodes.x import y\n"
        "def f():\n    import comfy.sd as c\n    from . import z\n"
    )
    assert set(imports(tmp_path, file)) == {
        "nodes",
        "pack.nodes",
        "pack.nodes.x.y",
        "comfy.sd",
        "pack.host.z",
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way_only(layer, repository):
    wrong = [
        f"{path.relative_to(repository)} imports {name}"
        for path in sources(repository, layer)
        for name in imports(repository, path)
        if within(name, FORBIDDEN[layer])
    ]
    assert wrong == []


def room_of(name: str) -> tuple[str, str] | None:
    """Layer and room of a module's absolute name; a file beside the rooms is a room by itself."""
    parts = name.removeprefix("comfyui_perfusion.").removeprefix(f"{PACK}.").split(".")
    return (parts[0], parts[1]) if parts[0] in ROOMS and len(parts) > 1 else None


@pytest.mark.parametrize("layer", ROOMS)
def test_every_file_is_in_a_room_and_every_room_is_listed(layer, repository):
    files = [path.relative_to(repository / layer) for path in sources(repository, layer)]
    loose = {path.name for path in files if len(path.parts) == 1}
    assert loose <= {"__init__.py", "shapes.py", "comfy_types.py"}
    assert {path.parts[0] for path in files if len(path.parts) > 1} == set(ROOMS[layer])


def test_a_room_may_only_use_rooms_listed_before_it():
    for rooms in ROOMS.values():
        names = list(rooms)
        for at, (room, used) in enumerate(rooms.items()):
            assert set(used) <= set(names[:at]), room


@pytest.mark.parametrize("layer", ROOMS)
def test_rooms_use_each_other_one_way_only(layer, repository):
    wrong = []
    for path in sources(repository, layer):
        parts = path.relative_to(repository / layer).parts
        if len(parts) == 1:
            continue
        allowed = {parts[0], *ROOMS[layer][parts[0]]}
        for name in imports(repository, path):
            found = room_of(name)
            if found and found[0] == layer and found[1] in ROOMS[layer] and found[1] not in allowed:
                wrong.append(f"{path.relative_to(repository)} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("layer", ROOMS)
def test_every_listed_arrow_between_rooms_is_used(layer, repository):
    used = {room: set() for room in ROOMS[layer]}
    for path in sources(repository, layer):
        parts = path.relative_to(repository / layer).parts
        for name in imports(repository, path):
            found = room_of(name)
            if len(parts) > 1 and found and found[0] == layer and found[1] != parts[0]:
                used[parts[0]].add(found[1])
    for room, allowed in ROOMS[layer].items():
        assert set(allowed) <= used[room], room


@pytest.mark.parametrize("layer", LAYERS)
def test_no_files_import_each_other_in_a_circle(layer, repository):
    files = {module_name(repository, path): path for path in sources(repository, layer)}
    uses = {
        name: {found for each in imports(repository, path) if (found := longest(each, files))}
        - {name}
        for name, path in files.items()
    }
    # A package and the files in it know each other: what counts is who needs whom.
    uses = {
        name: {one for one in used if one not in packages(files)} for name, used in uses.items()
    }
    done: set[str] = set()
    while ready := {name for name in uses if name not in done and uses[name] <= done}:
        done |= ready
    assert sorted(set(uses) - done) == []


def module_name(repository: Path, path: Path) -> str:
    parts = path.relative_to(repository).with_suffix("").parts
    return ".".join([PACK, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def packages(files: dict[str, Path]) -> set[str]:
    return {name for name, path in files.items() if path.name == "__init__.py"}


def longest(name: str, files: dict[str, Path]) -> str | None:
    """The file an imported name comes from: `pack.a.b` for `pack.a.b.Thing`."""
    name = name.replace("comfyui_perfusion.", f"{PACK}.", 1)
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or None


@pytest.mark.parametrize("layer", ["perfusion", "host", "nodes"])
def test_the_pack_itself_does_not_know_the_small_world_by_name(layer, repository):
    knowing = [
        path.relative_to(repository).as_posix()
        for path in sources(repository, layer)
        if "small_world" in path.read_text(encoding="utf-8")
    ]
    assert knowing == []


def test_the_method_needs_torch_einops_and_safetensors_and_nothing_else(repository):
    files = sources(repository, "perfusion")
    assert len(files) > 8
    for path in files:
        name = path.relative_to(repository).as_posix()
        needed = METHOD_NEEDS | METHOD_MAY_USE.get(name, set())
        roots = {module.split(".")[0] for module in imports(repository, path)}
        assert roots - sys.stdlib_module_names - {PACK} <= needed, name
    inner = [name for path in files for name in imports(repository, path) if name[0:5] == "pack."]
    assert all(name.startswith("pack.perfusion.") for name in inner)


def test_the_method_can_be_imported_alone_and_brings_no_host(repository):
    code = (
        "import sys, perfusion\n"
        "hosts = {'comfy', 'folder_paths', 'nodes', 'open_clip'}\n"
        "found = [name for name in sys.modules if name.split('.')[0] in hosts]\n"
        "assert not found, found\n"
        "assert all(hasattr(perfusion, name) for name in perfusion.__all__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("layer", LAYERS)
def test_published_files_call_nothing_the_registry_withholds_packs_for(layer, repository):
    found = []
    for path in sources(repository, layer):
        name = path.relative_to(repository).as_posix()
        if name in PUBLISHED_EXCEPT:
            continue
        found += [
            f"{name} imports {n}" for n in imports(repository, path) if within(n, UNSAFE_MODULES)
        ]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                # model.eval() and the like are methods, not the builtin.
                method = isinstance(node.func, ast.Attribute) and called in ("eval", "exec")
                if called in UNSAFE_CALLS and not method:
                    found.append(f"{name}:{node.lineno} calls {called}")
    assert found == []


def test_the_method_is_kept_in_small_files(repository):
    lengths = sorted(len(p.read_text().splitlines()) for p in sources(repository, "perfusion"))
    assert lengths[-1] < 400
    assert lengths[len(lengths) // 2] <= 200
