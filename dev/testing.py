"""`python dev.py test`: all tests, and what computes once more as another processor would."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from .prepare import Layout, prepare
from .report import say
from .threads import PATIENT

# Sums in another order than on most machines of today: no wide vectors, and more threads.
FOREIGN = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "OMP_NUM_THREADS": "4",
    "MKL_NUM_THREADS": "4",
    "MKL_DYNAMIC": "FALSE",  # else as many as there are cores
    **PATIENT,  # four threads on two cores
}
MARKER = "numeric"  # set by tests/conftest.py
NOTHING_COLLECTED = 5  # pytest's status


def test(layout: Layout, pytest_options: Sequence[str]) -> int:
    """Run the tests with the environment's Python, the numeric ones twice; returns the status.

    `pytest_options` go to both runs; where they choose by marker, or only list tests, there is one.
    """
    host = prepare(layout, with_tests=True)
    environment = dict(os.environ)
    if not host.ours:
        environment["COMFYUI_PATH"] = str(host.comfyui)
    pytest = [str(host.python), "-m", "pytest", *pytest_options]
    status = subprocess.run(pytest, cwd=layout.root, env=environment).returncode
    if status == 2 or not runs_twice(pytest_options):  # 2: interrupted
        return status
    say("Once more what computes, as another processor with four threads would")
    again = [*pytest, "-m", MARKER]
    second = subprocess.run(again, cwd=layout.root, env={**environment, **FOREIGN}).returncode
    if second == NOTHING_COLLECTED:  # what was asked for computes nothing
        return status
    return status or second


def runs_twice(pytest_options: Sequence[str]) -> bool:
    """Whether a second run with our marker makes sense with these options."""
    lists = {"--collect-only", "--co", "--help", "-h", "--version", "-V", "--markers", "--fixtures"}
    own_marker = any(each.startswith("-m") for each in pytest_options)
    return not own_marker and lists.isdisjoint(pytest_options)
