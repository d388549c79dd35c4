"""Erasing and debiasing many concepts in a UNet at once, and what is preserved of the others."""

from __future__ import annotations

import re

import pytest
import torch
from comfyui_perfusion.host.closed_form.prompts import PromptEncoder
from comfyui_perfusion.nodes.debias import PerfusionDebias
from comfyui_perfusion.nodes.erase_concepts import PerfusionEraseConcepts
from comfyui_perfusion.nodes.preserve import PerfusionPreserve
from comfyui_perfusion.nodes.training import PerfusionCovariance
from comfyui_perfusion.perfusion.closed_form.constraints import Constraints
from comfyui_perfusion.perfusion.closed_form.erasure import parse_erasures
from comfyui_perfusion.perfusion.closed_form.mace import refinement_constraints
from comfyui_perfusion.perfusion.closed_form.solver import solve
from comfyui_perfusion.perfusion.closed_form.uce import replacement_constraints

from tests.host.closed_form.unet_edits import SOLVING, difference, weights_of

SENTENCES = "a {}\na photo of a {} on the beach"


def erase(model, clip, concepts="cat -> thing", method="both", **changes):
    settings = {"sentences": SENTENCES, **SOLVING, **changes}
    return PerfusionEraseConcepts.execute(model, clip, concepts, method, **settings).args


def moved(clip, before, edited, prompt) -> float:
    """How far the outputs of a prompt's words have moved, over all projections."""
    (found,) = PromptEncoder(clip)([prompt])
    words = found.encodings[found.first : found.end + 1].mT
    after = weights_of(edited)
    return sum(float(((after[key] - before[key]) @ words).norm()) for key in before)


def debias(model, clip, **changes):
    settings = {
        "concepts": "mug\ncup",
        "attributes": "white {}\nblue {}",
        "measured": "0.9, 0.1",
        "wanted": "",
        "step": 1.0,
        **SOLVING,
        **changes,
    }
    return PerfusionDebias.execute(model, clip, **settings).args


def test_many_erasures_in_parts_are_the_edit_of_all_together(worlds):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    lines = "cat -> animal\nbig dog -> animal\nhouse"
    edited, report = erase(model, clip, lines)
    encode, erasures = PromptEncoder(clip), parse_erasures(lines)
    chosen = SENTENCES.splitlines()
    together = Constraints.join(
        [
            refinement_constraints(encode, erasures, chosen),
            replacement_constraints(encode, erasures, chosen),
        ]
    )
    solved = solve(together, SOLVING["ridge"])
    assert f"constraints: {len(together)}, of which {solved.moved} ask" in report
    old, new = weights_of(model), weights_of(edited)
    for key, weight in old.items():
        wanted = weight + solved.factors(weight).dense()
        torch.testing.assert_close(new[key], wanted, rtol=1e-4, atol=1e-5)


def test_many_concepts_are_erased_in_one_solve_by_every_method(worlds):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    lines = "cat -> animal\nbig dog -> animal\nhouse"
    ranks = {}
    for method in ("replacement", "refinement", "both"):
        edited, report = erase(model, clip, lines, method)
        assert "house -> thing" in report
        assert difference(model, edited) > 1e-4
        ranks[method] = int(re.search(r"rank (\d+)", report).group(1))
    assert ranks["replacement"] == 6
    assert ranks["replacement"] < ranks["refinement"] <= ranks["both"]


def test_without_sentences_the_built_in_thirty_are_used(worlds):
    _, report = erase(worlds.model("small"), worlds.clip("sd1"), sentences="", method="replacement")
    assert int(re.search(r"constraints: (\d+)", report).group(1)) >= 30


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ("", "at least one phrase to erase"),
        ("cat -> Cat", "target 'cat' is equal to its anchor"),
        ("red dog house -> thing", "contains the preserved phrase 'red dog'"),
    ],
)
def test_erasing_that_contradicts_itself_is_refused(worlds, concepts, message):
    clip = worlds.clip("sd1")
    (kept,) = PerfusionPreserve.execute(clip, "red dog", 1.0).args
    with pytest.raises(ValueError, match=message):
        erase(worlds.model("small"), clip, concepts, preserve=kept)


def test_what_is_preserved_moves_less(worlds):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    (kept,) = PerfusionPreserve.execute(clip, "a dog\na house", 1000.0).args
    free, _ = erase(model, clip)
    held, report = erase(model, clip, preserve=kept)
    assert float(re.search(r"drift of what is preserved: (\S+)", report).group(1)) < 0.05
    before = weights_of(model)
    assert moved(clip, before, held, "a dog") < 0.1 * moved(clip, before, free, "a dog")


def test_statistics_are_preserved_and_allow_for_no_ridge_at_all(worlds):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    with pytest.raises(ValueError, match="lambda = 0 leaves the edit undetermined"):
        erase(model, clip, ridge=0.0)
    captions = [f"a {w} and a {v} {n}" for n in range(40) for w, v in ("xy", "zw", "uv")]
    covariance = PerfusionCovariance.execute(clip, "\n".join(captions)).args[0]
    (kept,) = PerfusionPreserve.execute(clip, "", 1.0, covariance, 1e6).args
    edited, report = erase(model, clip, ridge=1.0, preserve=kept)
    before, (free, _) = weights_of(model), erase(model, clip, ridge=1.0)
    held, loose = (moved(clip, before, each, captions[0]) for each in (edited, free))
    assert held < 0.3 * loose
    assert "not measured" in report
    other = worlds.new_clip("sd1", seed=9)
    with pytest.raises(ValueError, match="another text encoder"):
        PerfusionPreserve.execute(other, "a dog", 1.0, covariance)


def test_nothing_to_preserve_is_refused(worlds):
    with pytest.raises(ValueError, match="prompts or statistics to preserve"):
        PerfusionPreserve.execute(worlds.clip("sd1"), " \n", 1.0)


def test_debiasing_pushes_each_concept_towards_the_rarer_attribute(worlds):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    edited, report = debias(model, clip, ridge=1e-4)
    assert "debias mug, cup" in report
    mug, white, blue = (
        prompt.encodings[prompt.last_word]
        for prompt in PromptEncoder(clip)(["mug", "white mug", "blue mug"])
    )
    wanted = mug + 0.4 * (blue - white)
    old, new = weights_of(model), weights_of(edited)
    for key in old:
        torch.testing.assert_close(new[key] @ mug, old[key] @ wanted, rtol=1e-2, atol=1e-3)


def test_a_further_debiasing_goes_back_by_less_where_earlier_counts_show_the_way(worlds):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    settings = {"concepts": "mug", "attributes": "white\nblue", "step": 1.0}
    first, report = debias(model, clip, **settings, measured="0.8, 0.2", strength=0.5)
    assert "mug: -0.3 white, +0.3 blue" in report
    assert "shortened" not in report
    # Half of it was applied and half of the mugs' share changed sides: half of the way back.
    second, report = debias(first, clip, **settings, measured="0.2, 0.8")
    assert "mug: +0.075 white, -0.075 blue (shortened by earlier counts)" in report
    # The next one knows both counts, and the way between them.
    _, report = debias(second, clip, **settings, measured="0.6, 0.4")
    assert "mug: -0.0187 white, +0.0187 blue (shortened" in report
    for other in ({"restart": True}, {"attributes": "white\nred"}, {"concepts": "cup"}):
        _, report = debias(first, clip, **{**settings, "measured": "0.2, 0.8", **other})
        assert "+0.3 white" in report
        assert "shortened" not in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measured": "0.9; 0.1"}, "measured: expected numbers separated by commas"),
        ({"measured": "0.9"}, "2 measured shares"),
        ({"measured": "0.5, 0.5"}, "shares of 'mug' are the wanted ones"),
        ({"concepts": " "}, "at least one concept to debias"),
        ({"attributes": "white {}"}, "at least two attributes"),
    ],
)
def test_debiasing_that_cannot_be_meant_is_refused(worlds, changes, message):
    with pytest.raises(ValueError, match=message):
        debias(worlds.model("small"), worlds.clip("sd1"), **changes)
