"""Telling the person something while a node runs."""

from __future__ import annotations

import logging

from comfy_execution.utils import get_executing_context

logger = logging.getLogger("perfusion")


def tell(text: str) -> None:
    """Say something in the log and, inside a prompt, on the node that is running."""
    logger.info("%s", text)
    context = get_executing_context()
    if context is not None:
        # Where there is a prompt it is there; elsewhere it would take seconds to load.
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, context.node_id)
