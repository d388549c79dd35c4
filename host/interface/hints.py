"""Warnings of the pack, shown on the page that runs the workflow and not only in the log."""

from __future__ import annotations

import logging
import sys

from comfy_execution.utils import get_executing_context

EVENT = "perfusion.hint"

logger = logging.getLogger("perfusion")


class PageHints(logging.Handler):
    """Sends every warning that is given while a node runs to the page that started it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one warning; nothing outside of a prompt, where there is no node to show it on."""
        context = get_executing_context()
        module = sys.modules.get("server")
        server = getattr(getattr(module, "PromptServer", None), "instance", None)
        if context is None or server is None:
            return
        message = {
            "node": context.node_id,
            "prompt_id": context.prompt_id,
            "text": record.getMessage(),
        }
        server.send_sync(EVENT, message, server.client_id)


def register_hints() -> None:
    """Show the pack's warnings on the page; more than once is as good as once."""
    if not any(isinstance(handler, PageHints) for handler in logger.handlers):
        logger.addHandler(PageHints())
