"""The step of debiasing, against models whose shares answer pushes in a known way."""

from __future__ import annotations

import math

import pytest

from perfusion.closed_form.counts import Counted, next_pushes

WANTED = (0.5, 0.5)


def shares_at(pushed, offsets, steepness):
    """A soft choice between attributes, each as likely as its offset and its push make it."""
    odds = [math.exp(o + steepness * p) for o, p in zip(offsets, pushed, strict=True)]
    return tuple(each / sum(odds) for each in odds)


def rounds(offsets, wanted, steepness, count, remember=True, step=0.5, pictures=None):
    """The largest missing share after each of some edits in a row."""
    pushed, earlier, off = (0.0,) * len(offsets), [], []
    for _ in range(count + 1):
        shares = shares_at(pushed, offsets, steepness)
        if pictures is not None:
            first = round(shares[0] * pictures) / pictures
            shares = (first, 1 - first)
        off.append(max(abs(w - s) for w, s in zip(wanted, shares, strict=True)))
        pushes = next_pushes(shares, wanted, step, earlier if remember else ())
        earlier.append(Counted(shares, pushes))
        pushed = tuple(a + b for a, b in zip(pushed, pushes, strict=True))
    return off


def test_without_an_earlier_count_the_push_is_what_is_missing_times_the_step():
    assert next_pushes((0.1, 0.9), WANTED, 2.0) == pytest.approx((0.8, -0.8))
    same_side = Counted((0.2, 0.8), (0.1, -0.1))
    assert next_pushes((0.1, 0.9), WANTED, 2.0, [same_side]) == pytest.approx((0.8, -0.8))


def test_between_two_counts_on_both_sides_the_push_goes_where_their_line_meets_the_target():
    # At 0 there were 80 %, at -0.3 there are 20 %: the line meets 50 % half of the way back.
    before = Counted((0.8, 0.2), (-0.3, 0.3))
    assert next_pushes((0.2, 0.8), WANTED, 1.0, [before]) == pytest.approx((0.15, -0.15))
    # A count from before that one lies in another place, and is looked at there.
    first = Counted((0.9, 0.1), (-0.1, 0.1))
    assert next_pushes((0.2, 0.8), WANTED, 1.0, [first, before]) == pytest.approx((0.15, -0.15))


def test_a_step_that_is_shorter_anyway_stays_as_it_is():
    before = Counted((0.8, 0.2), (-0.3, 0.3))
    assert next_pushes((0.2, 0.8), WANTED, 0.1, [before]) == pytest.approx((0.03, -0.03))


def test_a_count_of_the_very_same_model_tells_nothing_of_a_way_back():
    again = Counted((0.8, 0.2), (0.0, 0.0))
    assert next_pushes((0.2, 0.8), WANTED, 0.5, [again]) == pytest.approx((0.15, -0.15))


@pytest.mark.parametrize("steepness", [15, 25, 60])
def test_where_a_fixed_step_leaps_to_and_fro_earlier_counts_let_it_settle(steepness):
    offsets = (1.5, 0.0)
    fixed = rounds(offsets, WANTED, steepness, 8, remember=False)
    assert min(fixed[-4:]) > 0.3
    assert rounds(offsets, WANTED, steepness, 8)[-1] < 0.05


def test_so_it_does_with_counts_of_few_pictures():
    off = rounds((1.5, 0.0), WANTED, 25, 6, pictures=16)
    assert off[-1] <= 1 / 16


def test_several_attributes_settle_together_and_pushes_add_up_to_nothing():
    wanted = (0.5, 0.3, 0.2)
    offsets = (2.0, 0.0, -1.0)
    assert min(rounds(offsets, wanted, 30, 12, remember=False)[-4:]) > 0.3
    assert rounds(offsets, wanted, 30, 12)[-1] < 0.01
    pushes = next_pushes((0.1, 0.2, 0.7), wanted, 1.0, [Counted((0.8, 0.1, 0.1), (-0.3, 0.1, 0.2))])
    assert sum(pushes) == pytest.approx(0.0, abs=1e-12)


def test_a_gentle_curve_is_climbed_as_before():
    slow = rounds((1.5, 0.0), WANTED, 2, 5, remember=False)
    assert rounds((1.5, 0.0), WANTED, 2, 5) == pytest.approx(slow)
