"""What is said to the person at the terminal, and failures told in one sentence."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path


class Failure(Exception):
    """Something a person can put right: its text is one sentence and is all that is shown."""


def say(text: str) -> None:
    """Print one line at once, also into a pipe."""
    clear_progress()
    print(text, flush=True)


def progress(text: str) -> None:
    """Show a passing state on one line that the next one overwrites; silent without a terminal."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print("\r" + text[:width].ljust(width), end="", flush=True)


def clear_progress() -> None:
    """Remove what `progress` left on the line."""
    if sys.stdout.isatty():
        print("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="", flush=True)


def describe_os_error(error: OSError) -> str:
    """One sentence for an error of the operating system."""
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full{place}: free some space and run the same command again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"No permission to write{place}: run from a folder you own."
    return f"The operating system refused{place}: {error.strerror or error}."


def require_space(folder: Path, gigabytes: float, purpose: str) -> None:
    """Fail before anything is written when `folder`'s disk lacks the room."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise Failure(
            f"The disk of {folder} is too full for {purpose}: {gigabytes:g} GB are needed and "
            f"{free:.1f} GB are free; free some space and run the same command again."
        )
