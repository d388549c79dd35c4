"""One continuous rule for strengths: its four properties, for the sets and for the edit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from perfusion.gated.gate import Gate
from perfusion.gated.rank_one import Direction, combine, edit_projection, gated_inputs
from perfusion.gated.strengths import levels

WIDTH, FEATURES = 12, 5
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 1.75)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def concepts(strengths: tuple[float, ...], own_covariances: bool = False) -> list[Direction]:
    """Concepts with much in common, so that subtracting each by itself would be wrong."""
    inputs = normal(1, len(strengths), WIDTH) + 2 * normal(2, WIDTH)
    found = []
    for at, (i, strength) in enumerate(zip(inputs, strengths, strict=True)):
        samples = normal(3 + at * own_covariances, 50, WIDTH)
        u = torch.linalg.solve(samples.mT @ samples, i)
        found.append(Direction(i, u, Gate(0.6, 0.15, strength), name=f"concept-{at}"))
    return found


def edited(strengths: tuple[float, ...], own_covariances: bool = False) -> Tensor:
    outputs = normal(8, len(strengths), FEATURES)
    weight, encodings = normal(9, FEATURES, WIDTH), normal(10, 7, WIDTH)
    return edit_projection(weight, encodings, concepts(strengths, own_covariances), outputs)


def test_the_edit_is_the_plain_projection_and_its_parts_level_by_level():
    """Against every set's own edit, of strength 1, blended as the sum says."""
    plain = edited((0.0, 0.0, 0.0))
    for strengths in itertools.product(STRENGTHS, repeat=3):
        expected = plain
        for part, chosen in levels(strengths):
            alone = tuple(float(at in chosen) for at in range(3))
            expected = expected + part * (edited(alone) - plain)
        torch.testing.assert_close(edited(strengths), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("own_covariances", [False, True])
@pytest.mark.parametrize("others", [(1.0, 1.0), (1.0, 0.5), (0.3, 1.7), (0.0, 1.0)])
def test_a_strength_that_vanishes_meets_strength_zero(others, own_covariances):
    without = edited((others[0], 0.0, others[1]), own_covariances)
    for small in (1e-3, 1e-6, 1e-9):
        found = edited((others[0], small, others[1]), own_covariances)
        bound = small * float((edited((1.0, 1.0, 1.0), own_covariances) - without).abs().max())
        assert float((found - without).abs().max()) <= 20 * bound + 1e-12


def test_the_edit_is_continuous_where_strengths_meet_each_other():
    at = edited((0.7, 0.7, 0.4))
    for step in (1e-4, -1e-4):
        near = edited((0.7, 0.7 + step, 0.4))
        assert float((near - at).abs().max()) < 1e-2
        assert not torch.equal(near, at)


def test_the_change_is_no_larger_than_the_proof_allows():
    """|h - h'| <= 2 max_S |E_S - W e| sum |w - w'|, over random pairs of strengths."""
    plain = edited((0.0, 0.0, 0.0))
    sets = [edited(tuple(map(float, chosen))) for chosen in itertools.product((0, 1), repeat=3)]
    largest = max(float((one - plain).abs().max()) for one in sets)
    random = torch.Generator().manual_seed(0)
    for _ in range(60):
        first, second = torch.rand(2, 3, generator=random).tolist()
        distance = sum(abs(a - b) for a, b in zip(first, second, strict=True))
        change = float((edited(tuple(first)) - edited(tuple(second))).abs().max())
        assert change <= 2 * largest * distance + 1e-12


def test_every_strength_one_is_the_papers_solve_through_the_gram_matrix():
    directions = concepts((1.0, 1.0, 1.0), own_covariances=True)
    encodings = normal(10, 7, WIDTH)
    i = torch.stack([d.i for d in directions])
    u = torch.stack([d.u for d in directions])
    coefficients = torch.linalg.solve(u @ i.mT, u @ encodings.mT)
    found, _ = gated_inputs(encodings, directions)
    torch.testing.assert_close(found, encodings - coefficients.mT @ i, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strength", [-0.5, 0.0, 0.3, 1.0, 1.6])
def test_one_concept_is_blended_with_the_plain_projection(strength):
    plain, whole = edited((0.0,)), edited((1.0,))
    expected = (1 - strength) * plain + strength * whole
    torch.testing.assert_close(edited((strength,)), expected, rtol=1e-12, atol=1e-12)


def test_a_negative_strength_mirrors_and_vanishes_continuously_too():
    torch.testing.assert_close(
        edited((-0.5, -0.5, -0.5)) + edited((0.5, 0.5, 0.5)), 2 * edited((0.0, 0.0, 0.0))
    )
    at = edited((1.0, 0.0, -0.5))
    assert float((edited((1.0, 1e-9, -0.5)) - at).abs().max()) < 1e-6


def test_the_sets_are_nested_add_up_to_the_strengths_and_take_equal_ones_together():
    assert levels([0.5, 1.0, 0.0, 0.5]) == [(0.5, (1,)), (0.5, (0, 1, 3))]
    assert levels([1.0, 1.0]) == [(1.0, (0, 1))]
    assert levels([0.0]) == []
    assert levels([1.0, -0.25]) == [(1.0, (0,)), (-0.25, (1,))]
    for strengths in itertools.product(STRENGTHS, repeat=3):
        found = levels(strengths)
        for at, strength in enumerate(strengths):
            assert sum(part for part, chosen in found if at in chosen) == pytest.approx(strength)


def test_all_of_several_dependent_groups_are_named_whatever_their_lengths_and_duals():
    i = normal(5, 2, WIDTH)
    metrics = [normal(6 + at, 40, WIDTH) for at in range(4)]
    vectors = [i[0], 1000 * i[0], i[1], 0.001 * i[1]]
    several = [
        Direction(v, torch.linalg.solve(m.mT @ m, v), Gate(), name=f"concept-{at}")
        for at, (v, m) in enumerate(zip(vectors, metrics, strict=True))
    ]
    with pytest.raises(ValueError, match="'concept-0' and 'concept-1' and 'concept-2' and 'conc"):
        combine(several)


def test_both_of_two_dependent_concepts_are_named_where_their_duals_are_very_unlike():
    """The eigenvector of [[1, 100], [0.01, 1]] lies a hundred to one on the first of them."""
    first = Direction(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 100.0]), Gate(), name="first")
    other = Direction(torch.tensor([0.0, 1.0]), torch.tensor([0.01, 1.0]), Gate(), name="other")
    with pytest.raises(ValueError, match="the concepts 'first' and 'other' are"):
        combine([first, other])
    with pytest.raises(ValueError, match="the concepts 'other' and 'first' are"):
        combine([other, first])


@pytest.mark.parametrize("strengths", [(1.0, 0.5, 0.0), (0.2, 0.9, 0.9), (1.7, 0.3, 1.0)])
def test_adding_the_sets_one_after_the_other_from_the_strongest_is_the_same_rule(strengths):
    """``sum_j w_j (E_j - E_(j-1))`` over sets that grow, as encodings of keys are blended."""
    numbers = normal(11, 2, 2, 2, FEATURES)

    def of(concepts: tuple[int, ...]) -> Tensor:
        return numbers[tuple(int(at in concepts) for at in range(3))]

    found = before = of(())
    for strength in sorted({strength for strength in strengths if strength}, reverse=True):
        after = of(tuple(at for at in range(3) if strengths[at] >= strength))
        found = found + strength * (after - before)
        before = after
    expected = of(()) + sum(part * (of(chosen) - of(())) for part, chosen in levels(strengths))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
