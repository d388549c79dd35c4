"""Concepts that do not fit are refused, with both sides and the remedy in the message."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import UnsupportedModelError


def changed(concept, **fields):
    return dataclasses.replace(concept, **fields)


def test_a_concept_of_another_family_is_refused_with_both_named(worlds):
    concept = worlds.concept("sd1")
    with pytest.raises(
        ValueError, match=r"trained for Stable Diffusion 1\.x, the model is Stable Diffusion 2\.x"
    ):
        apply_concepts(worlds.model("sd2"), worlds.clip("sd2"), [concept])


def test_a_concept_of_a_family_nobody_knows_is_refused_by_its_name(worlds):
    concept = changed(worlds.concept("sd1"), family="sd9")
    with pytest.raises(ValueError, match="trained for 'sd9', the model is Stable Diffusion 1"):
        apply_concepts(worlds.model("sd1"), worlds.clip("sd1"), [concept])


def test_a_concept_with_other_layers_is_refused_with_the_first_odd_one(worlds):
    concept = worlds.concept("sd1")
    fewer = dict(list(concept.o_v.items())[1:])
    with pytest.raises(ValueError, match=r"15 cross-attention layers, the model has 16.*only in"):
        apply_concepts(worlds.model("sd1"), worlds.clip("sd1"), [changed(concept, o_v=fewer)])


def test_a_layer_of_another_width_is_refused_with_both_widths(worlds):
    concept = worlds.concept("sd1")
    name = next(iter(concept.o_v))
    wide = {**concept.o_v, name: torch.zeros(5)}
    with pytest.raises(ValueError, match=r"has 5 values for layer .* the model has 32"):
        apply_concepts(worlds.model("sd1"), worlds.clip("sd1"), [changed(concept, o_v=wide)])


def test_two_parallel_concepts_are_refused_by_name(worlds):
    first = worlds.concept("sd1", 0, "<a>")
    second = changed(first, placeholder="<b>", u=first.u * 2)
    with pytest.raises(ValueError, match=r"'<a>' and '<b>' are \(nearly\) parallel"):
        apply_concepts(worlds.model("sd1"), worlds.clip("sd1"), [first, second])


def test_the_clip_of_another_family_is_refused(worlds):
    with pytest.raises(UnsupportedModelError, match="loaded together with the model"):
        apply_concepts(worlds.model("sd1"), worlds.clip("sd2"), [worlds.concept("sd1")])
