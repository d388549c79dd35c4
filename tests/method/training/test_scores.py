"""Which checkpoint is kept: the rule, and the similarities it goes by."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from perfusion.training.scores import Score, best, mean_similarity, paired_similarity, table

# A run that overfits: ever more like the training pictures, ever less like the prompts.
OVERFITTING = [
    Score(100, 0.60, 0.300),
    Score(200, 0.70, 0.295),
    Score(300, 0.78, 0.285),
    Score(400, 0.80, 0.250),
    Score(500, 0.81, 0.220),
]


def test_a_run_that_overfits_is_stopped_where_the_prompts_begin_to_suffer():
    assert best(OVERFITTING).step == 300


def test_a_run_that_still_learns_keeps_its_last_checkpoint():
    scores = [Score(step, 0.5 + step / 1000, 0.3 - step / 100_000) for step in (100, 200, 300)]
    assert best(scores).step == 300


def test_a_run_of_one_checkpoint_keeps_it():
    assert best([Score(50, -0.2, 0.1)]).step == 50


def test_the_order_of_the_scores_does_not_matter():
    orders = [random.Random(seed).sample(OVERFITTING, 5) for seed in range(20)]
    assert {best(order).step for order in orders} == {300}


def test_of_equal_checkpoints_the_earliest_is_kept():
    scores = [Score(step, 0.7, 0.3) for step in (300, 100, 200)]
    assert best(scores).step == 100
    nothing_alike = [Score(step, -0.1, 0.3) for step in (20, 10)]
    assert best(nothing_alike).step == 10


def test_leaving_out_another_checkpoint_never_changes_which_of_two_is_better():
    for size in (2, 3, 4):
        for some in itertools.combinations(OVERFITTING, size):
            if OVERFITTING[2] in some:
                assert best(some).step == 300


def test_the_scale_of_a_similarity_does_not_matter():
    halved = [Score(s.step, s.image, s.prompt / 2) for s in OVERFITTING]
    assert best(halved).step == 300


def test_a_checkpoint_unlike_either_is_worth_nothing():
    assert Score(1, -0.5, 0.3).both == 0
    assert Score(1, 0.5, -0.3).both == 0
    assert math.isclose(Score(1, 0.9, 0.4).both, 0.6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.5, -2.0])
def test_nan_and_what_is_no_cosine_is_refused_with_its_step(value):
    with pytest.raises(ValueError, match="step 7: expected the image similarity"):
        Score(7, value, 0.3)
    with pytest.raises(ValueError, match="step 7: expected the prompt similarity"):
        Score(7, 0.3, value)


def test_no_checkpoints_and_two_of_one_step_are_refused():
    with pytest.raises(ValueError, match="at least one checkpoint, found none"):
        best([])
    with pytest.raises(ValueError, match="found two of step 100"):
        best([*OVERFITTING, Score(100, 0.9, 0.9)])


def test_similarities_are_means_of_cosines():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(n, 7, generator=generator) for n in (3, 5))
    cosines = torch.nn.functional.cosine_similarity(ours[:, None], theirs[None], dim=-1)
    assert math.isclose(mean_similarity(ours, theirs), float(cosines.mean()), abs_tol=1e-6)
    pairs = torch.nn.functional.cosine_similarity(ours, theirs[:3])
    assert math.isclose(paired_similarity(ours, theirs[:3]), float(pairs.mean()), abs_tol=1e-6)
    assert math.isclose(mean_similarity(ours * 1024, theirs), mean_similarity(ours, theirs))


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.full((2, 3), torch.nan), "finite embeddings"),
        (torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), "other than zero"),
        (torch.zeros(0, 3), r"embeddings \(n, d\), found \(0, 3\)"),
        (torch.ones(3), r"embeddings \(n, d\), found \(3,\)"),
    ],
)
def test_embeddings_that_mean_nothing_are_refused(embeddings, message):
    with pytest.raises(ValueError, match=message):
        mean_similarity(embeddings, torch.ones(2, 3))


def test_pairs_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\), found \(4, 3\)"):
        paired_similarity(torch.ones(2, 3), torch.ones(4, 3))


def test_the_table_lists_the_steps_in_order_and_marks_the_choice():
    text = table([*reversed(OVERFITTING)], Score(0, 0.5, 0.31))
    lines = text.splitlines()
    assert lines[0].split() == ["step", "image", "prompt", "both"]
    assert lines[1].split() == ["plain", "0.500", "0.310", "0.394"]
    assert [line.split()[0] for line in lines[2:]] == ["100", "200", "300", "400", "500"]
    assert [line.split()[0] for line in lines if "chosen" in line] == ["300"]
