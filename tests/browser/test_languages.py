"""The interface in other languages: what it shows of our nodes is what was translated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page

from tests.browser.pages import ROOT

TRANSLATIONS = sorted((ROOT / "dev" / "translations").glob("*.json"))
SPEAK = """async language => {
    await window.app.extensionManager.setting.set("Comfy.Locale", language);
}"""
SPOKEN = """() => window.app.extensionManager.setting.get("Comfy.Locale")"""
SAYS = """key => {
    const {$t} = document.querySelector("#vue-app").__vue_app__.config.globalProperties;
    return $t(`nodeDefs.${key}`);
}"""


@pytest.mark.parametrize("file", TRANSLATIONS, ids=lambda file: file.stem)
def test_names_and_tooltips_are_shown_as_they_were_translated(page: Page, file: Path) -> None:
    translation = json.loads(file.read_text(encoding="utf-8"))
    page.evaluate(SPEAK, file.stem)
    shown = "PerfusionTrainingOptions"
    name = translation["nodes"][shown]["display_name"]
    page.wait_for_function(
        f"""([name, language]) => ({SAYS})('{shown}.display_name') === name
            || ({SPOKEN})() !== language""",
        arg=[name, file.stem],
        timeout=120_000,
    )
    if page.evaluate(SPOKEN) != file.stem:
        pytest.skip(f"this version of the interface cannot be set to {file.stem}")
    # One with {}, which the interface would read as a command.
    english = next(text for text in translation["tooltips"] if text.startswith("What to draw"))
    assert "{}" in translation["tooltips"][english]
    said = page.evaluate(SAYS, f"{shown}.inputs.sample_prompts.tooltip")
    assert said == translation["tooltips"][english]
    page.evaluate(SPEAK, "en")
