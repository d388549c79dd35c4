"""A real ComfyUI server with this pack: started, waited for, asked for the pack, stopped."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from urllib.error import URLError

from .base import PACK
from .client import Client
from .comfyui import Host
from .report import Failure

PROOF = "PerfusionApplyConcepts"  # a node that is there only if the pack was imported
START_SECONDS = 300  # ten are usual; a busy machine may take long


def free_port() -> int:
    """A port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def device_options(python: Path) -> list[str]:
    """`--cpu` unless torch finds an accelerator; only asked, being slow, if one is likely."""
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    nvidia = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()
    if not (apple or nvidia):
        return ["--cpu"]
    code = (
        "import sys, torch; "
        "sys.exit(not (torch.cuda.is_available() or torch.backends.mps.is_available()))"
    )
    found = subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0
    return [] if found else ["--cpu"]


class Server:
    """One server process; use it as a context manager."""

    def __init__(
        self,
        host: Host,
        base: Path,
        port: int | None = None,
        extra: list[str] | None = None,
        cpu: bool = False,
    ) -> None:
        self.port = port or free_port()
        self.client = Client(self.port)
        self.base = base
        self.log = base / "server.log"
        options = ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
        options += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK]
        options += ["--disable-api-nodes", "--port", str(self.port), *(extra or [])]
        # -u and UTF-8: the log must be readable while the server runs, on Windows too.
        self.command = [str(host.python), "-u", "-X", "utf8", str(host.comfyui / "main.py")]
        self.command += [*(["--cpu"] if cpu else device_options(host.python)), *options]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.base,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A Ctrl-C is ours to handle: the server is stopped by __exit__.
                start_new_session=os.name != "nt",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None:
                raise Failure(
                    f"ComfyUI stopped while starting: {self.complaint()} (log: {self.log})"
                )
            try:
                self.client.json("/system_stats")
                break
            except (URLError, ConnectionError, TimeoutError):
                if time.monotonic() > deadline:
                    raise Failure(
                        f"ComfyUI did not answer within {START_SECONDS} s (log: {self.log})."
                    ) from None
                time.sleep(0.2)
        if PROOF not in self.client.json("/object_info/" + PROOF):
            raise Failure(
                f"ComfyUI runs without the pack, which did not load: {self.complaint()} "
                f"(log: {self.log})"
            )

    def complaint(self) -> str:
        """What the log says went wrong: its last error, else its last line."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text("utf-8", "replace"))
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        imports = [line for line in lines if "Cannot import" in line]
        errors = [line for line in lines if "Error" in line]
        return (imports or errors or lines or ["it said nothing"])[-1]

    def stop(self) -> None:
        """End the process, by force if it does not go."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
