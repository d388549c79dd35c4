"""The example of a modality that is no picture, with less training than it takes by itself."""

from __future__ import annotations

import pytest
import torch

from perfusion.concept.concept_file import load_concept
from research import text_to_motion as example


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("motion")
    learned, results = example.run(pen_steps=150, concept_steps=80, folder=folder)
    return learned, results, folder


def error(results: dict[str, torch.Tensor], name: str) -> float:
    return float((results[name] - results["wanted"]).square().mean())


def test_the_concept_draws_what_the_word_could_not_in_sizes_and_places_asked_for(shown):
    _, results, _ = shown
    assert error(results, "concept") < 0.6 * error(results, "word")


def test_only_the_concepts_word_opens_the_gate(shown):
    learned, _, _ = shown
    opened = learned.gates("draw a large circle left")[:6]
    assert float(opened[3]) > 0.7
    assert float(opened[[0, 1, 2, 4]].max()) < 0.3


def test_the_concept_is_a_file_of_two_kilobytes(shown):
    _, _, folder = shown
    path = folder / "heart.safetensors"
    assert path.stat().st_size < 2048
    assert list(load_concept(path).o_v) == [f"attentions.{n}" for n in range(3)]


def test_the_plot_is_drawn(shown):
    learned, results, folder = shown
    path = folder / "plots" / "motion.png"
    example.plot(learned, results, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000
