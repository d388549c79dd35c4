"""The pack in a real web interface of its own, for scripts that make things with it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .chromium import find_chromium, launch, open_interface
from .prepare import Layout, make_server, prepare
from .report import Failure
from .server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parent.parent
SIZE = 1600, 1000


@contextmanager
def own_interface(
    size: tuple[int, int] = SIZE, nodes2: bool = False
) -> Iterator[tuple[Page, Server]]:
    """The page and its server, in an empty base directory; in Nodes 2.0 if asked for.

    Raises:
        Failure: where there is no Chromium.
    """
    executable = find_chromium()
    if executable is None:
        raise Failure("No Chromium found: install one or let CHROMIUM name it.")
    layout = Layout(ROOT)
    host = prepare(layout, with_tests=True)
    with (
        tempfile.TemporaryDirectory() as base,
        make_server(host, layout, Path(base)) as server,
        launch(executable) as browser,
    ):
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        server.client.json("/settings/Comfy.VueNodes.Enabled", nodes2)
        open_interface(page, server.client)
        yield page, server
