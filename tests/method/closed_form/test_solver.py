"""The closed form is the minimiser it claims to be, in every form it is solved in."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import pytest
import torch

from perfusion.closed_form.constraints import Constraints
from perfusion.closed_form.solver import solve

WIDTH, OUT = 12, 7
FEW, MANY = 5, 30  # fewer and more constraints than dimensions


def randn(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def constraints(count: int, seed: int = 0) -> Constraints:
    weights = randn(count, seed=seed + 2).abs() + 0.1
    return Constraints(randn(count, WIDTH, seed=seed), randn(count, WIDTH, seed=seed + 1), weights)


def a_prior(tokens: int = 40) -> torch.Tensor:
    rows = randn(tokens, WIDTH, seed=7)
    return 0.3 * rows.mT @ rows


WEIGHT = randn(OUT, WIDTH, seed=9)


def brute_force(weight, asked, values, ridge, prior):
    """Ordinary least squares over stacked rows: no normal equations, no formula of ours."""
    root = asked.row_weights.sqrt()[:, None]
    rows = [asked.inputs * root, math.sqrt(ridge) * torch.eye(WIDTH, dtype=torch.float64)]
    wanted = [(values - asked.inputs @ weight.mT) * root, torch.zeros(WIDTH, OUT).double()]
    if prior is not None:
        rows.append(torch.linalg.cholesky(prior).mT)
        wanted.append(torch.zeros(WIDTH, OUT).double())
    solution = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted), driver="gelsd").solution
    return solution.mT


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("prior", [None, a_prior()], ids=["no prior", "prior"])
def test_the_edit_is_the_least_squares_minimiser(count, prior):
    asked = constraints(count)
    found = solve(asked, 0.1, prior).factors(WEIGHT).dense()
    expected = brute_force(WEIGHT, asked, asked.targets @ WEIGHT.mT, 0.1, prior)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_no_small_change_of_the_minimiser_is_better():
    asked, prior = constraints(FEW), a_prior()
    best = solve(asked, 0.1, prior).factors(WEIGHT).dense()

    def loss(change):
        off = asked.inputs @ (WEIGHT + change).mT - asked.targets @ WEIGHT.mT
        held = torch.einsum("o d, d e, o e ->", change, prior, change)
        return float(
            (asked.row_weights * off.square().sum(1)).sum() + 0.1 * change.norm() ** 2 + held
        )

    for seed in range(5):
        assert loss(best + 1e-3 * randn(OUT, WIDTH, seed=seed)) > loss(best)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_constraints_that_ask_for_nothing_are_refused(count):
    inputs = randn(count, WIDTH, seed=0)
    with pytest.raises(ValueError, match=rf"none of the {count} constraints asks for a change"):
        solve(Constraints(inputs, inputs.clone()), 0.1)


def parts_of(whole: Constraints, size: int) -> Iterator[Constraints]:
    for start in range(0, len(whole), size):
        rows = slice(start, start + size)
        yield Constraints(whole.inputs[rows], whole.targets[rows], whole.row_weights[rows])


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("prior", [None, a_prior()], ids=["no prior", "prior"])
@pytest.mark.parametrize("size", [1, 7])
def test_constraints_may_come_in_parts(count, prior, size):
    asked = constraints(count)
    whole, parts = solve(asked, 0.1, prior), solve(parts_of(asked, size), 0.1, prior)
    torch.testing.assert_close(
        parts.factors(WEIGHT).dense(), whole.factors(WEIGHT).dense(), rtol=1e-10, atol=1e-10
    )
    assert (parts.count, parts.moved, parts.rank) == (whole.count, whole.moved, whole.rank)
    assert torch.equal(parts.sample.inputs, whole.sample.inputs)
    assert math.isclose(parts.condition, whole.condition, rel_tol=1e-6)


def test_few_moving_constraints_among_many_still_make_an_edit_of_their_rank():
    asked = constraints(MANY)
    targets = asked.inputs.clone()
    targets[3::10] = asked.targets[3::10]
    asked = Constraints(asked.inputs, targets, asked.row_weights)
    found = solve(parts_of(asked, 4), 0.1)
    assert (found.count, found.moved, found.rank) == (MANY, 3, 3)
    expected = brute_force(WEIGHT, asked, targets @ WEIGHT.mT, 0.1, None)
    torch.testing.assert_close(found.factors(WEIGHT).dense(), expected, rtol=1e-6, atol=1e-6)


def test_parts_are_let_go_once_there_are_as_many_constraints_as_dimensions():
    alive: list[weakref.ref] = []
    held = []

    def parts():
        for seed in range(40):
            part = constraints(WIDTH // 2, seed=10 * seed)
            alive.append(weakref.ref(part.inputs))
            yield part
            del part
            held.append(sum(each() is not None for each in alive))

    solve(parts(), 0.1)
    assert len(held) == 40
    # The part in work, and the one that was handed in first.
    assert max(held) <= 2


def test_a_sample_of_the_constraints_is_kept_evenly_spread():
    asked = constraints(1000)
    sample = solve(parts_of(asked, 37), 0.1).sample
    assert torch.equal(sample.inputs, asked.inputs[::16])
    assert torch.equal(sample.row_weights, asked.row_weights[::16])
    assert len(sample) == 63


def test_parts_of_different_width_are_refused():
    with pytest.raises(ValueError, match="one width, found 12 and 11"):
        solve([constraints(FEW), Constraints(torch.ones(1, 11), torch.zeros(1, 11))], 0.1)
    with pytest.raises(ValueError, match="at least one set of constraints"):
        solve([], 0.1)


def test_a_stronger_ridge_changes_less_down_to_nothing():
    asked = constraints(MANY)
    ridges = (1e-3, 1.0, 1e3, 1e6, 1e12)
    norms = [solve(asked, ridge).factors(WEIGHT).norm() for ridge in ridges]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-9 * norms[0]


@pytest.mark.parametrize("count", [FEW, MANY])
def test_a_weak_ridge_meets_constraints_that_can_be_met(count):
    source, change = randn(count, WIDTH, seed=0), randn(WIDTH, WIDTH, seed=4)
    asked = Constraints(source, source @ change.mT)
    weight = WEIGHT + solve(asked, 1e-9).factors(WEIGHT).dense()
    torch.testing.assert_close(weight @ source.mT, WEIGHT @ asked.targets.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_the_order_of_constraints_does_not_matter(count):
    asked = constraints(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    shuffled = Constraints(asked.inputs[order], asked.targets[order], asked.row_weights[order])
    first, second = (solve(each, 0.1).factors(WEIGHT).dense() for each in (asked, shuffled))
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


def test_only_the_proportions_of_weights_ridge_and_prior_matter():
    asked, prior = constraints(MANY), a_prior()
    larger = Constraints(asked.inputs, asked.targets, asked.row_weights * 64)
    first = solve(asked, 0.1, prior).factors(WEIGHT).dense()
    second = solve(larger, 6.4, prior * 64).factors(WEIGHT).dense()
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


def test_the_scale_of_the_encodings_only_asks_for_another_ridge():
    asked = constraints(FEW)
    larger = Constraints(asked.inputs * 4, asked.targets * 4, asked.row_weights)
    first = solve(asked, 0.1).factors(WEIGHT).dense()
    second = solve(larger, 1.6).factors(WEIGHT).dense()
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


def test_the_small_and_the_large_form_agree():
    asked = constraints(FEW)
    # A prior of almost nothing forces the D x D form.
    nothing = torch.eye(WIDTH, dtype=torch.float64) * 1e-12
    first, second = (solve(asked, 0.1, prior) for prior in (None, nothing))
    torch.testing.assert_close(
        first.factors(WEIGHT).dense(), second.factors(WEIGHT).dense(), rtol=1e-8, atol=1e-8
    )
    assert math.isclose(first.condition, second.condition, rel_tol=0.05)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_single_and_half_precision_inputs_agree_with_double(kind):
    asked = constraints(MANY)
    exact = solve(asked, 0.1).factors(WEIGHT).dense()
    rounded = Constraints(asked.inputs.to(kind), asked.targets.to(kind), asked.row_weights)
    found = solve(rounded, 0.1).factors(WEIGHT.to(kind))
    assert found.up.dtype == torch.float32
    allowed = 200 * torch.finfo(kind).eps
    assert float((found.dense() - exact).norm() / exact.norm()) < allowed


def test_an_ill_conditioned_edit_keeps_its_digits_where_an_inverse_in_single_loses_them():
    # Long encodings of few directions and a small ridge, as TIME's defaults make them.
    common = randn(3, WIDTH, seed=3) * 300
    source = randn(8, 3, seed=4) @ common + randn(8, WIDTH, seed=5)
    asked = Constraints(source, source + randn(8, WIDTH, seed=6))
    system = source.mT @ source + 0.1 * torch.eye(WIDTH, dtype=torch.float64)
    change = (asked.targets - source).mT @ source
    exact = WEIGHT @ change @ torch.linalg.inv(system)
    inverse = WEIGHT.float() @ change.float() @ torch.linalg.inv(system.float())
    found = solve(asked, 0.1).factors(WEIGHT.float()).dense()
    error = (found - exact).norm() / exact.norm()
    assert error < 1e-6
    assert (inverse - exact).norm() / exact.norm() > 100 * error


@pytest.mark.parametrize("count", [FEW, MANY])
def test_the_condition_number_is_that_of_the_system(count):
    asked = constraints(count)
    scaled = asked.inputs * asked.row_weights.sqrt()[:, None]
    system = scaled.mT @ scaled + 0.1 * torch.eye(WIDTH, dtype=torch.float64)
    found = solve(asked, 0.1).condition
    assert math.isclose(found, float(torch.linalg.cond(system)), rel_tol=0.05)


@pytest.mark.parametrize("copies", [1, MANY])
def test_the_condition_number_sees_directions_that_cancel_in_a_sum(copies):
    # The longest direction of the system is (1, -1), which a sum over its entries does not see.
    row = 600 * torch.ones(1, WIDTH, dtype=torch.float64)
    row[:, ::2] *= -1
    inputs = torch.cat([row, -row]).repeat(copies, 1)
    found = solve(Constraints(inputs, inputs + randn(2 * copies, WIDTH, seed=1)), 0.1).condition
    system = inputs.mT @ inputs + 0.1 * torch.eye(WIDTH, dtype=torch.float64)
    assert math.isclose(found, float(torch.linalg.cond(system)), rel_tol=0.05)


def test_the_rank_is_that_of_the_tokens_that_move():
    asked = constraints(FEW)
    targets = asked.targets.clone()
    targets[0] = asked.inputs[0]
    edit = solve(Constraints(asked.inputs, targets), 0.1)
    assert edit.rank == FEW - 1
    torch.testing.assert_close(edit.right @ edit.right.mT, torch.eye(FEW - 1).double())
    assert math.isclose(edit.factors(WEIGHT).norm(), float(edit.factors(WEIGHT).dense().norm()))


def test_the_weight_stays_as_it_was():
    before = WEIGHT.clone()
    solve(constraints(FEW), 0.1).factors(WEIGHT)
    assert torch.equal(WEIGHT, before)


def test_a_prior_holds_what_it_was_measured_on():
    asked = constraints(FEW)
    preserved = randn(3, WIDTH, seed=30)
    prior = 1e6 * preserved.mT @ preserved
    free, held = (solve(asked, 0.1, p).factors(WEIGHT).dense() for p in (None, prior))
    assert float((held @ preserved.mT).norm()) < 1e-4 * float((free @ preserved.mT).norm())


def test_without_a_ridge_only_a_prior_of_full_rank_will_do():
    asked = constraints(FEW)
    assert solve(asked, 0.0, a_prior()).rank == FEW
    with pytest.raises(ValueError, match=r"lambda = 0 leaves the edit undetermined.*prior of full"):
        solve(asked, 0.0)
    with pytest.raises(ValueError, match=r"cannot be solved with lambda = 0.*more captions"):
        solve(asked, 0.0, a_prior(tokens=3))


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize(
    ("size", "weight", "ridge", "message"),
    [
        (1e200, 1.0, 0.1, "sums over the constraints are not finite"),
        (1.0, 1e308, 0.1, "not finite"),
        (1e150, 1e10, 0.1, "not finite"),
        (1.0, 1.0, 1e-300, "lambda = 1e-300"),
        (1.0, 1e-200, 1e140, "nothing is left of the edit with lambda = 1e[+]140"),
    ],
)
def test_a_system_that_cannot_be_solved_is_refused_in_a_sentence(
    count, size, weight, ridge, message
):
    row = randn(1, WIDTH, seed=1)
    inputs = (size * row).expand(count, WIDTH)
    asked = Constraints(inputs, 2 * inputs, torch.full((count,), weight, dtype=torch.float64))
    with pytest.raises(ValueError, match=message):
        solve(asked, ridge)


def test_a_prior_that_is_no_second_moment_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"cannot be solved .*not positive definite"):
        solve(constraints(FEW), 0.1, -10 * a_prior())


@pytest.mark.parametrize("ridge", [-1.0, math.nan, math.inf])
def test_a_ridge_that_is_no_weight_is_refused(ridge):
    with pytest.raises(ValueError, match="ridge"):
        solve(constraints(FEW), ridge)


def test_bad_constraints_are_refused_with_what_was_found():
    good = randn(FEW, WIDTH, seed=0)
    with pytest.raises(ValueError, match=r"one shape.*\(5, 12\) and \(4, 12\)"):
        Constraints(good, good[1:])
    with pytest.raises(ValueError, match="finite encodings as targets"):
        Constraints(good, good * math.nan)
    for weights in (torch.zeros(FEW), -torch.ones(FEW), torch.ones(FEW + 1), torch.ones(FEW) / 0):
        with pytest.raises(ValueError, match="5 positive constraint weights"):
            Constraints(good, good, weights)
    with pytest.raises(ValueError, match="at least one set"):
        Constraints.join([])
    with pytest.raises(ValueError, match="at least one constraint"):
        solve(Constraints(good[:0], good[:0]), 0.1)


def test_a_prior_or_a_projection_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"prior of shape \(12, 12\).*\(11, 11\)"):
        solve(constraints(FEW), 0.1, torch.eye(11))
    with pytest.raises(ValueError, match=r"projection \(d, 12\), found \(7, 11\)"):
        solve(constraints(FEW), 0.1).factors(WEIGHT[:, 1:])
    with pytest.raises(ValueError, match="finite prior"):
        solve(constraints(FEW), 0.1, torch.eye(WIDTH) * math.nan)


def test_weights_that_are_not_finite_are_refused():
    broken = WEIGHT.clone()
    broken[2, 3] = math.inf
    with pytest.raises(ValueError, match="finite weights"):
        solve(constraints(FEW), 0.1).factors(broken)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_gives_the_same_edit():
    asked = constraints(MANY)
    found = solve(asked, 0.1, a_prior(), device="cuda").factors(WEIGHT.cuda()).dense()
    expected = solve(asked, 0.1, a_prior()).factors(WEIGHT).dense()
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-7, atol=1e-7)
