"""`dev.py serve` as a person uses it, with a ComfyUI of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dev.client import Client
from dev.comfyui import Host
from dev.server import free_port


@pytest.mark.skipif(os.name == "nt", reason="a Ctrl-C cannot be sent to one process on Windows")
def test_serve_uses_the_comfyui_that_comfyui_path_names_and_ends_on_ctrl_c(
    repository: Path, comfy_host: Host
) -> None:
    port = free_port()
    environ = {**os.environ, "COMFYUI_PATH": str(comfy_host.comfyui), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "dev.py", "serve", "--no-browser", "--cpu", "--port", str(port)],
        cwd=repository,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite started in the background ignores Ctrl-C, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "http://127.0.0.1:" in line:
                break
        address = next(word for word in lines[-1].split() if word.startswith("http://"))
        assert f"Using the ComfyUI in {comfy_host.comfyui.resolve()}" in lines[0]
        assert address == f"http://127.0.0.1:{port}"
        (device,) = Client(port).json("/system_stats")["devices"]
        assert device["type"] == "cpu"
        assert "PerfusionTrainConcept" in Client(port).json("/object_info/PerfusionTrainConcept")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(15)
    assert process.returncode == 0, err
    assert "Stopped." in out
    assert "Traceback" not in err
    wait_until_closed(port)


def wait_until_closed(port: int) -> None:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            Client(port).json("/system_stats")
        except OSError:
            return
        time.sleep(0.2)
    raise AssertionError("the server outlived dev.py")
