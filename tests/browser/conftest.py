"""The real web interface of the real server in a real Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Response

from dev.chromium import find_chromium, launch, open_interface
from dev.server import Server

# What the stock interface logs as errors by itself on every start.
STOCK_ERRORS = (
    "Failed to load resource",  # settings that do not exist yet; ours are seen by their address
    "ComfyApp graph accessed before initialization",
    "https://huggingface.co/Comfy-Org/",  # models of the default workflow, looked for in vain
)


@dataclass
class Complaints:
    """Everything a page complained about, but for what the stock interface always says."""

    found: list[str] = field(default_factory=list)

    def on_console(self, message: ConsoleMessage) -> None:
        ours = "perfusion" in (message.text + message.location.get("url", "")).lower()
        stock = any(text in message.text for text in STOCK_ERRORS)
        if (message.type == "error" and not stock) or (message.type == "warning" and ours):
            self.found.append(f"console {message.type}: {message.text}")

    def on_error(self, error: Error) -> None:
        self.found.append(f"uncaught: {error}")

    def on_response(self, response: Response) -> None:
        if response.status >= 400 and "perfusion" in response.url.lower():
            self.found.append(f"HTTP {response.status}: {response.url}")


# By module: playwright keeps an event loop in this thread for as long as it lives, which would
# be in the way of other tiers' tests.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium on this machine: install one or let CHROMIUM name it")
    with launch(executable) as browser:
        yield browser


@pytest.fixture(scope="module")
def opened(browser: Browser, comfy_server: Server) -> Iterator[tuple[Page, Complaints]]:
    """The web interface, opened once: loading it is the slow part."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    complaints = Complaints()
    page.on("console", complaints.on_console)
    page.on("pageerror", complaints.on_error)
    page.on("response", complaints.on_response)
    open_interface(page, comfy_server.client)
    yield page, complaints
    context.close()


@pytest.fixture
def page(opened: tuple[Page, Complaints]) -> Page:
    """The open web interface, as the test before left it."""
    return opened[0]


@pytest.fixture
def complaints(opened: tuple[Page, Complaints]) -> Iterator[Complaints]:
    """What the page complains about from its opening to the end of the test."""
    yield opened[1]
    opened[1].found.clear()
