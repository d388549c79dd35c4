"""Thin factors: sums are exact, a shorter rank is the nearest one and says what it costs."""

from __future__ import annotations

import math

import pytest
import torch

from perfusion.closed_form.low_rank import LowRank, lora_tensors


def change(rank: int, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(*s, generator=generator).double() for s in ((9, rank), (rank, 14)))
    return LowRank(up, down)


def test_a_sum_of_changes_is_exact():
    first, second = change(2), change(3, seed=1)
    total = LowRank.total([first.scaled(0.5), second])
    assert total.rank == 5
    torch.testing.assert_close(total.dense(), 0.5 * first.dense() + second.dense())


def test_the_norm_is_that_of_the_change():
    assert math.isclose(change(4).norm(), float(change(4).dense().norm()))


def test_what_is_said_twice_needs_its_rank_only_once():
    once = change(3)
    short, error = LowRank.total([once, once.scaled(2.0)]).truncated()
    assert short.rank == 3
    assert error < 1e-7
    torch.testing.assert_close(short.dense(), 3 * once.dense())


def test_a_shorter_change_is_the_nearest_and_its_error_is_stated():
    whole = change(6)
    short, error = whole.truncated(2)
    values = torch.linalg.svdvals(whole.dense())
    best = float(values[2:].norm() / values.norm())
    assert short.rank == 2
    assert math.isclose(error, best, rel_tol=1e-6)
    found = float((short.dense() - whole.dense()).norm() / whole.dense().norm())
    assert math.isclose(found, best, rel_tol=1e-6)


def test_both_factors_share_the_scale():
    tiny, _ = LowRank(change(3).up * 1e-6, change(3).down * 1e6).truncated()
    assert 0.5 < float(tiny.up.norm() / tiny.down.norm()) < 2


def test_a_change_of_nothing_stays_nothing():
    short, error = LowRank(torch.zeros(4, 2), torch.ones(2, 5)).truncated(1)
    assert (short.rank, error) == (0, 0.0)


def test_lora_tensors_are_the_change_at_strength_one():
    tensors = lora_tensors(
        {"layer": change(3), "still": LowRank(torch.ones(2, 0), torch.ones(0, 3))}
    )
    assert set(tensors) == {f"layer.{n}" for n in ("lora_up.weight", "lora_down.weight", "alpha")}
    up, down = (tensors[f"layer.lora_{n}.weight"] for n in ("up", "down"))
    scale = float(tensors["layer.alpha"]) / down.shape[0]
    assert up.dtype == torch.float16
    torch.testing.assert_close(
        scale * up.double() @ down.double(), change(3).dense(), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize(("dtype", "rank"), [(torch.bfloat16, 257), (torch.float16, 2049)])
def test_the_rank_is_written_exactly_whatever_the_factors_are_written_in(dtype, rank):
    wide = LowRank(torch.ones(3, rank), torch.ones(rank, 2))
    assert float(lora_tensors({"layer": wide}, dtype)["layer.alpha"]) == rank


def test_a_change_that_is_not_finite_cannot_be_shortened():
    broken = change(2).scaled(math.nan)
    with pytest.raises(ValueError, match="change of finite numbers"):
        broken.truncated(1)


def test_what_cannot_be_saved_is_refused():
    with pytest.raises(ValueError, match="nothing to save"):
        lora_tensors({})
    with pytest.raises(ValueError, match=r"layer has values that torch\.float16 cannot hold"):
        lora_tensors({"layer": change(1).scaled(1e9)})
    with pytest.raises(ValueError, match="rank of at least 1"):
        change(2).truncated(0)
    with pytest.raises(ValueError, match=r"\(9, 2\) and \(3, 14\)"):
        LowRank(change(2).up, change(3).down)
