"""What holds for dev.py and dev/ as a whole."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dev.bench import bench_names

SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}


def developer_trees(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    for file in [root / "dev.py", *sorted((root / "dev").glob("*.py"))]:
        yield file, ast.parse(file.read_text(encoding="utf-8"))


def test_dev_py_runs_where_no_package_is_installed(repository: Path) -> None:
    without_packages = [sys.executable, "-S", "-E", "-s", "dev.py", "serve", "--help"]
    done = subprocess.run(without_packages, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--no-browser" in done.stdout


def test_no_command_goes_through_a_shell(repository: Path) -> None:
    for file, tree in developer_trees(repository):
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "shell":
                raise AssertionError(f"{file.name}:{node.value.lineno} passes shell=")
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in SHELLS, f"{file.name}:{node.lineno}"


def test_the_code_is_clean_under_ruff(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "."],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_bench_knows_the_benchmarks_and_refuses_other_names(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "dev.py", "bench", "nothing"],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "invalid choice: 'nothing'" in done.stderr
    scripts = [file.stem for file in (repository / "benchmarks").glob("[a-z]*.py")]
    assert bench_names(repository) == sorted(scripts)
    assert all(name in done.stderr for name in scripts)
