"""Placeholder words in prompts, through ComfyUI's own CLIPTextEncode."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import safetensors.torch
import torch
from comfy_execution.utils import CurrentNodeContext
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.pictures.training_images import encode_images
from comfyui_perfusion.host.text.placeholders import (
    PlaceholderError,
    is_existing_word,
    serve_vectors,
    with_placeholders,
)
from comfyui_perfusion.host.training.view import training_view

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
    wrong = dataclasses.replace(concept, **{"embeddings": {"l": torch.zeros(1024)}})
    with pytest.raises(ValueError, match=r"768 wide.*clip_l, found one 1024 wide"):
        with_placeholders(worlds.clip("sd1"), [wrong])


def test_two_concepts_with_one_placeholder_are_refused(worlds):
    concepts = [worlds.concept("sd1", 0, "<Thing>"), worlds.concept("sd1", 1, "<thing>")]
    with pytest.raises(PlaceholderError, match="'<thing>' is used by two of the concepts"):
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


def test_an_embedding_file_of_the_same_name_is_told_of_and_stays_usable(
    worlds, caplog, tmp_path, monkeypatch
):
    stock = worlds.clip("sd1")
    vector = torch.arange(768.0)
    safetensors.torch.save_file({"emb_params": vector[None]}, tmp_path / "sks_dog.safetensors")
    tokenizer = copy.copy(stock.tokenizer)
    tokenizer.clip_l = copy.copy(tokenizer.clip_l)
    tokenizer.clip_l.embedding_directory = [str(tmp_path)]
    stock.tokenizer = tokenizer
    concept = worlds.concept("sd1", 0, "sks_dog")
    with caplog.at_level(logging.WARNING, logger="perfusion"):
        clip = with_placeholders(stock, [concept])
    assert "embedding:sks_dog the file" in caplog.text
    section = clip.tokenize("sks_dog embedding:sks_dog sks_dog")["l"][0]
    found = [token for token, _ in section if isinstance(token, torch.Tensor)]
    learned = concept.embeddings["l"]
    assert [torch.equal(token, learned) for token in found] == [True, False, True]
    assert torch.equal(found[1].float(), vector)


@pytest.mark.parametrize("key_lock", ["local", "global"])
def test_the_same_placeholder_twice_is_edited_in_both_places(worlds, key_lock):
    concept = worlds.concept("sd1_light", 0, "<thing>", bias=0.2)
    model = worlds.model("sd1_light")
    patched, clip = apply_concepts(model, worlds.clip("sd1"), [concept], key_lock)
    once, twice = "a <thing> and a cat", "a <thing> and a <thing>"
    found = worlds.sample(patched, clip, twice)
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, worlds.sample(patched, clip, once), atol=1e-3)
    if key_lock == "local":
        expected = worlds.sample(worlds.pure(model, [concept]), clip, twice)
        scale = float(expected.abs().max())
        torch.testing.assert_close(found / scale, expected / scale, rtol=2e-4, atol=2e-4)


def test_a_prompt_without_the_placeholder_works_and_says_so_once_for_each_run_of_a_node(
    worlds, caplog
):
    concept = worlds.concept("sd1_light", 0, "<thing>", bias=2.0, temperature=0.1)
    patched, clip = apply_concepts(worlds.model("sd1_light"), worlds.clip("sd1"), [concept])
    for prompt in ("first", "second"):
        caplog.clear()
        with (
            caplog.at_level(logging.WARNING, logger="perfusion"),
            CurrentNodeContext(f"placeholders, {prompt}", "1"),
        ):
            for _ in range(2):
                assert torch.isfinite(worlds.sample(patched, clip, "a cat")).all()
        assert caplog.text.count("no prompt says <thing>") == 1


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("superclass", ["birdbath", "teddy bear"])
def test_a_superclass_of_several_sub_words_starts_as_their_mean_and_is_found_in_prompts(
    worlds, family, superclass
):
    model, clip = worlds.new_model(f"{family}_light"), worlds.clip(family)
    images = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    pictures = encode_images(worlds.vae(), [images])
    with training_view(model, clip, pictures, superclass, "<new>") as view:
        start = view.initial_embeddings()
        for name in start:
            ids = getattr(clip.tokenizer, f"clip_{name}").tokenizer(superclass)["input_ids"][1:-1]
            assert len(ids) == 2
            encoder = getattr(clip.cond_stage_model, f"clip_{name}")
            table = encoder.transformer.get_input_embeddings().weight
            torch.testing.assert_close(start[name], table[ids].mean(0))
        encoded = view.encode_superclass([f"a {superclass}, on the beach"])
        assert encoded.mask[0].nonzero().flatten().tolist() == [2, 3]
        learned = view.encode(["a <new>, on the beach"], start)
        assert learned.mask[0].nonzero().flatten().tolist() == [2]


def test_several_concepts_of_one_superclass_keep_their_own_directions(worlds):
    concepts = [worlds.concept("sd1_light", at, f"<{at}>") for at in range(3)]
    assert {concept.superclass for concept in concepts} == {"cat"}
    model = worlds.model("sd1_light")
    patched, clip = apply_concepts(model, worlds.clip("sd1"), concepts)
    prompt = "<0>, <1>; <2>"
    expected = worlds.sample(worlds.pure(model, concepts), clip, prompt)
    scale = float(expected.abs().max())
    found = worlds.sample(patched, clip, prompt)
    torch.testing.assert_close(found / scale, expected / scale, rtol=2e-4, atol=2e-4)
