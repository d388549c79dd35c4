"""The real web interface in a real browser, for the browser tests and for making templates.

Needs the package playwright (tests/requirements.txt) and a Chromium or Chrome of the machine.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .client import Client

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
USUAL_PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Google/Chrome/Application/chrome.exe",
)
# A browser that talks to this machine only, and that also starts as root in a container.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
READY = """() => window.app?.graph && window.LiteGraph?.registered_node_types?.KSampler
              && !document.querySelector('#splash-loader')"""


def find_chromium() -> str | None:
    """The browser that CHROMIUM names, else one of the machine's, else None."""
    named = os.environ.get("CHROMIUM")
    if named:
        return named
    found = (shutil.which(name) for name in NAMES)
    usual = (place for place in USUAL_PLACES if Path(place).exists())
    return next((place for place in (*found, *usual) if place), None)


@contextmanager
def launch(executable: str) -> Iterator[Browser]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def open_interface(page: Page, client: Client) -> None:
    """Load the server's web interface and wait until its graph can be used."""
    # Else the first visit opens the template dialog over everything.
    client.json("/settings/Comfy.TutorialCompleted", True)
    page.goto(client.address)
    page.wait_for_function(READY, timeout=120_000)
    page.wait_for_selector("canvas", timeout=60_000)
