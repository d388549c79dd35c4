"""Every node, every input and every tooltip is there in every language."""

from __future__ import annotations

import json
import re

import pytest
from comfyui_perfusion.nodes import NODES

from dev.make_locales import (
    LOCALES,
    TRANSLATIONS,
    definitions,
    literal,
    missing_tooltips,
    node_texts,
)

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
def test_no_tooltip_is_left_in_english(language):
    """To mend: translate the texts in dev/translations and run dev.make_locales."""
    translation = read(TRANSLATIONS / f"{language}.json")
    assert missing_tooltips(translation, node_texts()) == []
    found = read(LOCALES / language / "nodeDefs.json")
    for node in NODES:
        schema = node.define_schema()
        texts = found[schema.node_id]
        assert [name for name, entry in texts["inputs"].items() if not entry["tooltip"]] == []
        assert sorted(texts["outputs"], key=int) == [str(at) for at in range(len(schema.outputs))]


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_and_names_in_a_tooltip_are_those_of_the_english_one(language):
    # Numbers, places and choices, which are in English on the page too; a wrong line lacks them.
    fixed = re.compile(r"\{\}|%year%|\d+\.\d+|[a-z]+_[a-z]+|models/\w+|SD\w+|MASK|LoRA")
    choices = re.compile(r"\b(?:twin|local|global|always|never|cosine|constant|auto)(?=: )")
    translation = read(TRANSLATIONS / f"{language}.json")
    for english, text in translation["tooltips"].items():
        # Names of inputs are translated.
        wanted = {*fixed.findall(english), *choices.findall(english)} - set(translation["inputs"])
        assert [word for word in wanted if word not in text] == [], english


def test_a_tooltip_without_a_translation_stays_in_english_and_is_named():
    nodes = node_texts()
    translation = read(TRANSLATIONS / "de.json")
    english = nodes["PerfusionTrainConcept"].inputs["placeholder"]
    del translation["tooltips"][english]
    assert missing_tooltips(translation, nodes) == [english]
    inputs = definitions(translation, nodes)["PerfusionTrainConcept"]["inputs"]
    assert set(inputs["placeholder"]) == {"name"}
    assert set(inputs["superclass"]) == {"name", "tooltip"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_file_is_what_the_translation_says(language):
    translation = read(TRANSLATIONS / f"{language}.json")
    assert read(LOCALES / language / "nodeDefs.json") == definitions(translation, node_texts())


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_has_no_word_for_what_is_not_there(language):
    translation = read(TRANSLATIONS / f"{language}.json")
    nodes = node_texts()
    assert set(translation["nodes"]) == set(nodes)
    assert set(translation["inputs"]) == {name for node in nodes.values() for name in node.inputs}
    texts = {text for node in nodes.values() for text in (*node.inputs.values(), *node.outputs)}
    assert set(translation["tooltips"]) <= texts


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_holds_what_the_interface_would_read_as_a_command(language):
    found = read(LOCALES / language / "nodeDefs.json")
    texts = [text for node in found.values() for text in node.values() if isinstance(text, str)]
    for node in found.values():
        for entry in (*node["inputs"].values(), *node["outputs"].values()):
            texts += entry.values()
    # Placeholders, linked messages and plurals of the interface's message format.
    shown = [re.sub(r"\{'[^']*'\}", "", text) for text in texts]
    assert [text for text in shown if set("@|{}") & set(text)] == []


def test_signs_of_the_message_format_are_written_as_they_are_shown():
    assert literal("with {} or a@b | c") == "with {'{}'} or a{'@'}b {'|'} c"
