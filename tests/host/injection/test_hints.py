"""What a person is told of a graph that leaves a concept without effect, and where."""

from __future__ import annotations

import dataclasses
import itertools
import logging

import pytest
from comfy_execution.utils import CurrentNodeContext
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.text.placeholders import PlaceholderError
from comfyui_perfusion.host.text.text_encoders import clip_digest

_RUNS = itertools.count()


@pytest.fixture
def said(worlds, caplog):
    """Samples and returns what was warned of meanwhile, as one run of a graph's node."""

    def sample(model, positive, negative, steps=2):
        caplog.clear()
        with (
            caplog.at_level(logging.WARNING, logger="perfusion"),
            CurrentNodeContext(f"hints {next(_RUNS)}", "7"),
        ):
            worlds.sample_conds(model, positive, negative, steps)
        return [record.getMessage() for record in caplog.records if record.name == "perfusion"]

    return sample


@pytest.mark.parametrize("key_lock", ["local", "global"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_graph_that_is_wired_right_gives_no_hint(worlds, said, key_lock, steps):
    # This gate stands open for any word; what is said does not depend on it.
    concept = worlds.concept("sd1_light", 0, "<a>", bias=-2.0)
    model, clip = apply_concepts(worlds.model("sd1_light"), worlds.clip("sd1"), [concept], key_lock)
    assert said(model, worlds.encode(clip, "a <a>"), worlds.encode(clip, ""), steps) == []
    stock = worlds.encode(worlds.clip("sd1"), "")
    assert said(model, worlds.encode(clip, "a <a>"), stock, steps) == []


@pytest.mark.parametrize("bias", [-2.0, 0.5, 2.0])
@pytest.mark.parametrize("key_lock", ["local", "global"])
def test_a_text_encoder_that_bypasses_the_node_is_named_whatever_the_gate(
    worlds, said, bias, key_lock
):
    concept = worlds.concept("sd1_light", 0, "<a>", bias=bias)
    stock = worlds.clip("sd1")
    model, _ = apply_concepts(worlds.model("sd1_light"), stock, [concept], key_lock)
    (hint,) = said(model, worlds.encode(stock, "a <a>"), worlds.encode(stock, ""))
    assert "no prompt was encoded by a text encoder that knows <a>" in hint
    assert "use the CLIP output" in hint


@pytest.mark.parametrize("bias", [-2.0, 0.5, 2.0])
def test_a_prompt_with_the_superclass_word_only_is_told_to_write_the_placeholder(
    worlds, said, bias
):
    concept = worlds.concept("sd1_light", 0, "<a>", bias=bias)
    model, clip = apply_concepts(worlds.model("sd1_light"), worlds.clip("sd1"), [concept], "global")
    (hint,) = said(model, worlds.encode(clip, "a cat"), worlds.encode(clip, ""))
    assert "no prompt says <a>" in hint


def test_prompts_encoded_for_the_local_lock_are_locked_globally_too(worlds, said):
    concept = worlds.concept("sd1_light", 0, "<a>")
    model, stock = worlds.model("sd1_light"), worlds.clip("sd1")
    _, local = apply_concepts(model, stock, [concept])
    patched, clip = apply_concepts(model, stock, [concept], "global")
    negative = worlds.encode(stock, "")
    assert said(patched, worlds.encode(local, "a <a>"), negative) == []
    found = worlds.sample_conds(patched, worlds.encode(local, "a <a>"), negative)
    expected = worlds.sample_conds(patched, worlds.encode(clip, "a <a>"), negative)
    assert found.equal(expected)


def test_an_encoding_that_lost_its_twin_on_the_way_is_named_under_global_lock_only(worlds, said):
    concept = worlds.concept("sd1_light", 0, "<a>")
    stock = worlds.clip("sd1")
    for key_lock, count in (("global", 1), ("local", 0)):
        model, clip = apply_concepts(worlds.model("sd1_light"), stock, [concept], key_lock)
        ((encodings, more),) = worlds.encode(clip, "a <a>")
        changed = [[encodings.softmax(-1), more]]
        hints = said(model, changed, worlds.encode(clip, ""))
        assert len(hints) == count
        assert all("use local key lock with that node" in hint for hint in hints)


def test_a_model_without_the_concept_says_so_once_for_a_prompt_with_it(worlds, said):
    concept = worlds.concept("sd1_light", 0, "<a>")
    model, stock = worlds.model("sd1_light"), worlds.clip("sd1")
    _, clip = apply_concepts(model, stock, [concept])
    (hint,) = said(model, worlds.encode(clip, "a <a>"), worlds.encode(clip, ""))
    assert "connect the MODEL output" in hint
    assert said(model, worlds.encode(clip, "a cat"), worlds.encode(clip, "")) == []


def test_another_clip_skip_than_in_training_is_said_on_the_node(worlds, caplog):
    concept = worlds.concept("sd1_light", 0, "<a>")
    model, stock = worlds.model("sd1_light"), worlds.clip("sd1")
    same = dataclasses.replace(concept, **{"metadata": {"encoder_hash": clip_digest(stock)}})
    skipped = stock.clone()
    skipped.clip_layer(-2)
    for clip, warned in ((stock, False), (skipped, True)):
        caplog.clear()
        with (
            caplog.at_level(logging.WARNING, logger="perfusion"),
            CurrentNodeContext(f"skip {warned}", "3"),
        ):
            apply_concepts(model, clip, [same])
        assert ("another clip skip" in caplog.text) == warned


def test_one_placeholder_for_two_concepts_is_refused_as_such(worlds):
    concept = worlds.concept("sd1_light", 0, "<a>")
    model, stock = worlds.model("sd1_light"), worlds.clip("sd1")
    with pytest.raises(PlaceholderError, match="'<a>' is used by two of the concepts"):
        apply_concepts(model, stock, [concept, concept])
    patched, clip = apply_concepts(model, stock, [concept])
    with pytest.raises(PlaceholderError, match="'<a>' is used by two of the concepts"):
        apply_concepts(patched, clip, [concept])
