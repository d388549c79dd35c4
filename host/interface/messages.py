"""Telling the person something while a node runs: in the log, and on the node itself."""

from __future__ import annotations

import logging
import sys
from collections import deque

from comfy_execution.utils import get_executing_context

logger = logging.getLogger("perfusion")

# What was said last, so that a node which samples a hundred tiles says it once.
_said: deque[tuple[str, str, str]] = deque(maxlen=64)


def tell(text: str) -> None:
    """Say something in the log and, inside a prompt, on the node that is running."""
    logger.info("%s", text)
    _show(text)


def warn(text: str) -> None:
    """Warn in the log, from where the page gets it (`hints`); once for each run of a node."""
    context = get_executing_context()
    prompt, node = ("", "") if context is None else (context.prompt_id, context.node_id)
    if (prompt, node, text) in _said:
        return
    _said.append((prompt, node, text))
    logger.warning("%s", text)


def _show(text: str) -> None:
    context = get_executing_context()
    # Where there is a prompt to run, ComfyUI's server module is there too.
    server = sys.modules.get("server")
    if context is None or server is None:
        return
    instance = getattr(server.PromptServer, "instance", None)
    if instance is not None:
        instance.send_progress_text(text, context.node_id)
