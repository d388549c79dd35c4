"""pip in a virtual environment, its progress shown and its failures put into a sentence."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from .report import Failure, progress, say

NETWORK_SIGNS = (
    "NewConnectionError",
    "Failed to establish a new connection",
    "Temporary failure in name resolution",
    "ConnectTimeoutError",
    "Read timed out",
    "ProxyError",
    "connection broken by",
    "Could not fetch URL",
    "Network is unreachable",
)
DISK_SIGNS = ("No space left on device", "Disk quota exceeded", "not enough space on the disk")


def run_pip(python: Path, arguments: list[str], purpose: str, log: Path) -> None:
    """Run `python -m pip <arguments>`, its whole output going to `log`.

    Raises:
        Failure: one sentence that names the cause (network, disk, checksum or pip's own words).
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command += ["--retries", "3", *arguments]
    with (
        log.open("w", encoding="utf-8") as record,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            record.write(line)
            _show(line.strip())
    if process.returncode != 0:
        raise Failure(explain(log.read_text(encoding="utf-8"), purpose, log))


def _show(line: str) -> None:
    if line.startswith("Downloading ") and re.search(r"\(\d+(\.\d+)? (MB|GB)\)", line):
        say(f"   {line}")
    elif line.startswith("Installing collected packages"):
        packages = line.count(",") + 1
        say(f"   Installing {packages} packages (the slowest part)")
    elif line:
        progress(f"   {line}")


def explain(output: str, purpose: str, log: Path) -> str:
    """One sentence for a failed pip run, from what it printed."""
    if any(sign in output for sign in DISK_SIGNS):
        return (
            f"The disk is full, so {purpose} stopped: free some space and run the same command "
            "again."
        )
    if "DO NOT MATCH THE HASHES" in output:
        return (
            f"The checksum is wrong, so {purpose} stopped: the file from the package index is not "
            f"the one this pack was tested with (details: {log})."
        )
    if any(sign in output for sign in NETWORK_SIGNS):
        return (
            f"The package index could not be reached, so {purpose} stopped: check the network (or "
            f"PIP_INDEX_URL and the proxy settings) and run the same command again "
            f"(details: {log})."
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else "pip gave no reason"
    return f"pip failed, so {purpose} stopped: {reason.rstrip('.')} (details: {log})."
