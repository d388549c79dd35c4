"""The examples of docs/api.md, run as they stand against a real server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dev.server import Server

USUAL = "http://127.0.0.1:8188"


def example(repository: Path, language: str, server: Server) -> str:
    """A page's piece of code, at this server's address."""
    page = (repository / "docs" / "api.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    assert USUAL in code
    return code.replace(USUAL, server.client.address)


def test_the_python_example_trains_draws_and_fetches_the_pictures(
    repository: Path, comfy_server: Server, tmp_path: Path
) -> None:
    shutil.copytree(repository / "workflows" / "api", tmp_path / "workflows" / "api")
    code = example(repository, "python", comfy_server)
    assert code.count('["steps"] = 400') == 1
    code = code.replace('["steps"] = 400', '["steps"] = 3')  # that it learns is measured elsewhere
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert "PerfusionSaveConcept says from_python" in done.stdout
    assert list(tmp_path.glob("*.png"))
    assert list((comfy_server.base / "models" / "perfusion").glob("from_python*.safetensors"))


@pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("bash")), reason="there is no curl or no bash"
)
def test_the_curl_example_shows_what_is_in_a_concept(
    repository: Path, comfy_server: Server
) -> None:
    code = example(repository, "bash", comfy_server)
    done = subprocess.run(["bash", "-euc", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(done.stdout).values()
    assert run["status"]["status_str"] == "success"
    assert "<bo>" in run["outputs"]["2"]["text"][0]
