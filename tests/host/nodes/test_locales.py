"""Every node and every input has its name in every language."""

from __future__ import annotations

import json

import pytest
from comfyui_perfusion.nodes import NODES

from dev.make_locales import LOCALES, TRANSLATIONS, definitions, node_inputs

LANGUAGES = ("de", "es", "fr", "ja", "ko", "zh")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_six_languages_are_there():
    assert sorted(path.name for path in LOCALES.iterdir()) == sorted(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_node_and_no_input_lacks_its_name(language):
    found = read(LOCALES / language / "nodeDefs.json")
    assert set(found) == {node.define_schema().node_id for node in NODES}
    for node in NODES:
        schema = node.define_schema()
        texts = found[schema.node_id]
        assert texts["display_name"].endswith("(Perfusion)")
        assert texts["description"]
        assert {name: bool(entry["name"]) for name, entry in texts["inputs"].items()} == {
            entry.id: True for entry in schema.inputs
        }


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_file_is_what_the_translation_says(language):
    translation = read(TRANSLATIONS / f"{language}.json")
    assert read(LOCALES / language / "nodeDefs.json") == definitions(translation, node_inputs())


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_has_no_word_for_what_is_not_there(language):
    translation = read(TRANSLATIONS / f"{language}.json")
    nodes = node_inputs()
    assert set(translation["nodes"]) == set(nodes)
    assert set(translation["inputs"]) == {name for names in nodes.values() for name in names}


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_holds_what_the_interface_would_read_as_a_command(language):
    found = read(LOCALES / language / "nodeDefs.json")
    texts = [text for node in found.values() for text in node.values() if isinstance(text, str)]
    texts += [entry["name"] for node in found.values() for entry in node["inputs"].values()]
    # Placeholders, linked messages and plurals of the interface's message format.
    assert [text for text in texts if set("@|{}") & set(text)] == []
