"""What the web interface shows on a node while it trains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from comfy_execution.utils import get_executing_context

from ...perfusion.training.run import Progress

EVENT = "perfusion.training"
# Seconds between two messages; a step may take a thousandth of that.
_PAUSE = 0.3
_GIGABYTE = 1e9


@dataclass
class LiveProgress:
    """Sends where a training is to the page that started it, not more often than is seen.

    Attributes:
        steps: how many there will be.
        device: whose memory is shown.
        now: the clock, in seconds.
    """

    steps: int
    device: torch.device
    now: Callable[[], float] = time.monotonic
    _begun: tuple[int, float] | None = None
    _sent: float = -math.inf
    _points: list[list[float]] = field(default_factory=list)

    def on_step(self, done: Progress) -> None:
        """After each step."""
        now = self.now()
        if self._begun is None:
            # The first step also waits for what is loaded and compiled, so it is not counted.
            self._begun = done.step, now
        self._points.append([done.step, done.loss, done.smoothed.mean])
        if now - self._sent < _PAUSE and done.step < self.steps:
            return
        context = get_executing_context()
        if context is not None:
            where = {"node": context.node_id, "prompt_id": context.prompt_id}
            _send({**where, **self.message(done, now)})
        self._sent, self._points = now, []

    def message(self, done: Progress, now: float) -> dict[str, Any]:
        """Step, steps, seconds left (None before they are known), losses since the last message."""
        first, began = self._begun or (done.step, now)
        count = done.step - first
        left = (now - began) / count * (self.steps - done.step) if count else None
        total: Any = comfy.model_management.get_total_memory(self.device)
        free: Any = comfy.model_management.get_free_memory(self.device)
        return {
            "step": done.step,
            "steps": self.steps,
            "seconds_left": left,
            "points": self._points,
            "bands": [None if math.isnan(band) else band for band in done.smoothed.bands],
            "memory_gb": (total - free) / _GIGABYTE,
            "device": str(self.device),
        }


def _send(message: dict[str, Any]) -> None:
    # Where there is a prompt it is there; elsewhere it would take seconds to load.
    from server import PromptServer

    server = PromptServer.instance
    server.send_sync(EVENT, message, server.client_id)
