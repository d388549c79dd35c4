"""Placeholder words in prompts, through ComfyUI's own CLIPTextEncode."""

from __future__ import annotations

import logging

import pytest
import torch
from comfyui_perfusion.host.apply import apply_concepts
from comfyui_perfusion.host.tokens import (
    PlaceholderError,
    is_existing_word,
    serve_vectors,
    with_placeholders,
)

import nodes as comfy_nodes

END = 49407


def words(clip, prompt, encoder="l"):
    """(token id or "vector", weight) of a prompt without start, end and padding."""
    sections = clip.tokenize(prompt)[encoder]
    return [
        ("vector", weight) if isinstance(token, torch.Tensor) else (token, weight)
        for section in sections
        for token, weight in section[1 : section_end(section)]
    ]


def section_end(section):
    tokens = enumerate(token for token, _ in section)
    return next(at for at, token in tokens if not isinstance(token, torch.Tensor) and token == END)


def encode(clip, prompt):
    return comfy_nodes.CLIPTextEncode().encode(clip, prompt)[0][0]


@pytest.fixture(scope="module")
def clip(worlds):
    """An SD1.x text encoder that knows <thing> and sks_dog."""
    concepts = [worlds.concept("sd1", 0, "<thing>"), worlds.concept("sd1", 1, "sks_dog")]
    return with_placeholders(worlds.clip("sd1"), concepts)


@pytest.mark.parametrize(
    "prompt",
    [
        "a photo of a cat, on the beach",
        "",
        "(masterpiece:1.3), a [cat] (on (the) beach)",
        "embedding:nothing a cat",
        r"a \(cat\) <lora:x:1>",
        "word " * 100,
        "sks_dogs and x<thin",
    ],
)
def test_a_prompt_without_a_placeholder_is_unchanged_token_for_token(worlds, clip, prompt):
    stock = worlds.clip("sd1")
    assert clip.tokenize(prompt) == stock.tokenize(prompt)
    assert torch.equal(encode(clip, prompt)[0], encode(stock, prompt)[0])


@pytest.mark.parametrize(
    "pattern",
    [
        "a {}, on the beach",
        "{}",
        "a photo of {}.",
        "a {} and a {}",
        "{}'s hat",
        "in front of\n{}\nat night",
        '"{}"!',
    ],
)
def test_a_placeholder_takes_the_place_of_a_word_in_any_surroundings(worlds, clip, pattern):
    stock = words(worlds.clip("sd1"), pattern.replace("{}", "cat"))
    (cat,) = words(worlds.clip("sd1"), "cat")
    expected = [("vector", 1.0) if token == cat else token for token in stock]
    assert ("vector", 1.0) in expected
    assert words(clip, pattern.replace("{}", "<thing>")) == expected
    assert words(clip, pattern.replace("{}", "sks_dog")) == expected


def test_the_learned_vector_is_served_and_encoded_in_place(worlds, clip):
    concept = worlds.concept("sd1", 0, "<thing>")
    section = clip.tokenize("a <thing> here")["l"][0]
    assert torch.equal(section[2][0], concept.embeddings["l"])
    # The same through the embedding table: a token whose row is that vector.
    (cat,) = words(worlds.clip("sd1"), "cat")
    other = worlds.new_clip("sd1")
    with torch.no_grad():
        table = other.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
        table[cat[0]] = concept.embeddings["l"]
    found, pooled = encode(clip, "a <thing> here")
    expected, expected_pooled = encode(other, "a cat here")
    assert torch.equal(found, expected)
    assert torch.equal(pooled["pooled_output"], expected_pooled["pooled_output"])


@pytest.mark.parametrize(
    ("prompt", "weights"),
    [
        ("(<thing>:1.2)", [1.2]),
        ("(<thing>)", [1.1]),
        ("((<thing>))", [1.1 * 1.1]),
        ("(a <thing> there:0.5)", [0.5]),
        ("(<thing>:1.2) <thing>", [1.2, 1.0]),
        (r"\(<thing>\)", [1.0]),
    ],
)
def test_prompt_weights_apply_to_placeholders(clip, prompt, weights):
    found = [weight for token, weight in words(clip, prompt) if token == "vector"]
    assert found == pytest.approx(weights)


def test_several_placeholders_each_get_their_own_vector(worlds, clip):
    first, second = worlds.concept("sd1", 0), worlds.concept("sd1", 1)
    section = clip.tokenize("<thing> sks_dog <thing>")["l"][0]
    served = [token for token, _ in section if isinstance(token, torch.Tensor)]
    expected = [first.embeddings["l"], second.embeddings["l"], first.embeddings["l"]]
    assert all(torch.equal(a, b) for a, b in zip(served, expected, strict=True))


def test_a_placeholder_that_contains_another_is_not_taken_for_it(worlds):
    clip = with_placeholders(
        worlds.clip("sd1"), [worlds.concept("sd1", 0, "<a>"), worlds.concept("sd1", 1, "<a><b>")]
    )
    assert len([token for token, _ in words(clip, "<a><b>") if token == "vector"]) == 1
    assert len([token for token, _ in words(clip, "<a> <b>") if token == "vector"]) == 1


def test_case_does_not_matter_as_clip_lowers_all_text(clip):
    assert words(clip, "A <Thing> and SKS_DOG") == words(clip, "a <thing> and sks_dog")


def test_a_placeholder_behind_the_75th_word_is_served_in_the_next_section(clip):
    sections = clip.tokenize("word " * 80 + "<thing>")["l"]
    assert [len(section) for section in sections] == [77, 77]
    assert isinstance(sections[1][6][0], torch.Tensor)


def test_sdxl_gets_both_vectors_at_the_same_position(worlds):
    concept = worlds.concept("sdxl", 0, "<thing>")
    clip = with_placeholders(worlds.clip("sdxl"), [concept])
    tokens = clip.tokenize("a <thing>, nice")
    assert torch.equal(tokens["l"][0][2][0], concept.embeddings["l"])
    assert torch.equal(tokens["g"][0][2][0], concept.embeddings["g"])
    encoding, _ = encode(clip, "a <thing>, nice")
    plain, _ = encode(worlds.clip("sdxl"), "a cat, nice")
    assert encoding.shape == plain.shape
    # Causal encoders: what stands before the placeholder cannot tell.
    assert torch.equal(encoding[:, :2], plain[:, :2])
    assert not torch.equal(encoding[:, 2, :768], plain[:, 2, :768])
    assert not torch.equal(encoding[:, 2, 768:], plain[:, 2, 768:])


def test_the_refiner_needs_only_its_own_vector(worlds):
    concept = worlds.concept("sdxl_refiner", 0, "<thing>")
    clip = with_placeholders(worlds.clip("sdxl_refiner"), [concept])
    assert torch.equal(clip.tokenize("<thing>")["g"][0][1][0], concept.embeddings["g"])
    encode(clip, "a <thing>")


def test_the_clip_one_started_from_does_not_learn_the_placeholder(worlds):
    stock = worlds.clip("sd1")
    with_placeholders(stock, [worlds.concept("sd1", 0, "<thing>")])
    assert ("vector", 1.0) not in words(stock, "a <thing>")


def test_a_vector_of_the_wrong_width_is_an_error_naming_both(worlds):
    concept = worlds.concept("sd1")
    wrong = type(concept)(**{**vars(concept), "embeddings": {"l": torch.zeros(1024)}})
    with pytest.raises(ValueError, match=r"768 wide.*clip_l, found one 1024 wide"):
        with_placeholders(worlds.clip("sd1"), [wrong])


def test_two_concepts_with_one_placeholder_are_refused(worlds):
    concepts = [worlds.concept("sd1", 0, "<Thing>"), worlds.concept("sd1", 1, "<thing>")]
    with pytest.raises(PlaceholderError, match="'<thing>' is used by two concepts"):
        apply_concepts(worlds.model("sd1"), worlds.clip("sd1"), concepts)


def test_a_placeholder_that_is_a_word_is_warned_about(worlds, caplog):
    stock = worlds.clip("sd1")
    assert is_existing_word(stock, "cat")
    assert not is_existing_word(stock, "<cat>")
    with caplog.at_level(logging.WARNING, logger="perfusion"):
        clip = with_placeholders(stock, [worlds.concept("sd1", 0, "cat")])
    assert "'cat' is a word of its own" in caplog.text
    assert words(clip, "a cat")[1] == ("vector", 1.0)


def test_a_concept_may_have_several_vectors(worlds):
    rows = torch.arange(2 * 768.0).reshape(2, 768)
    clip = serve_vectors(worlds.clip("sd1"), "<long>", {"l": rows})
    assert [token for token, _ in words(clip, "a <long> x")[1:3]] == ["vector", "vector"]
