"""A placeholder completes while a prompt is typed, with the keyboard alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from dev.chromium import open_interface
from dev.server import Server
from tests.browser.pages import keep_picture, open_page

SENT = """async () => Object.values((await window.app.graphToPrompt()).output)
    .filter(node => node.class_type === "CLIPTextEncode").map(node => node.inputs.text)"""


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def page(request: pytest.FixtureRequest, browser: Browser, comfy_server: Server) -> Iterator[Page]:
    comfy_server.client.json("/settings/Comfy.VueNodes.Enabled", request.param == "nodes2")
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    open_interface(page, comfy_server.client)
    open_page(page, "03 two concepts together")
    yield page
    context.close()
    comfy_server.client.json("/settings/Comfy.VueNodes.Enabled", False)


def prompt_box(page: Page):
    box = page.locator("textarea:visible").filter(has_not_text="Two concepts").first
    box.click()
    box.fill("")
    return box


def test_a_placeholder_completes_with_tab_and_reaches_the_prompt(page: Page) -> None:
    box = prompt_box(page)
    box.press_sequentially("a photo of a <")
    menu = page.locator(".perfusion-completion")
    expect(menu).to_be_visible()
    assert menu.inner_text().split() == ["<bo>", "<olli>"]
    keep_picture(page, "completion of a placeholder")
    box.press("ArrowDown")
    box.press("Tab")
    expect(menu).to_have_count(0)
    expect(box).to_have_value("a photo of a <olli>")
    box.press_sequentially(" in the snow")
    assert "a photo of a <olli> in the snow" in page.evaluate(SENT)


def test_it_keeps_quiet_without_a_match_and_goes_at_escape(page: Page) -> None:
    box = prompt_box(page)
    box.press_sequentially("a photo of a cat")
    menu = page.locator(".perfusion-completion")
    page.wait_for_timeout(500)
    expect(menu).to_have_count(0)
    box.press_sequentially(" and <b")
    expect(menu).to_be_visible()
    box.press("Escape")
    expect(menu).to_have_count(0)
    expect(box).to_have_value("a photo of a cat and <b")


def test_enter_writes_a_new_line_when_nothing_is_offered(page: Page) -> None:
    box = prompt_box(page)
    box.press_sequentially("one")
    box.press("Enter")
    box.press_sequentially("two")
    expect(box).to_have_value("one\ntwo")
