"""Streaming, solving and refusing in the second moment of text encodings."""

from __future__ import annotations

import math

import pytest
import torch

from perfusion.gated.covariance import Covariance, CovarianceAccumulator
from perfusion.gated.gate import Gate
from perfusion.gated.rank_one import Direction, similarities

WIDTH = 16


def encodings(seed: int = 0, captions: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(captions, 7, WIDTH, generator=random)
    lengths = torch.randint(2, 8, (captions, 1), generator=random)
    return values, torch.arange(7)[None] < lengths


def measured(positions="words", ridge=1e-4, scale=1.0) -> Covariance:
    values, mask = encodings()
    accumulator = CovarianceAccumulator(WIDTH, positions, "encoder")
    accumulator.add(values * scale, mask)
    return accumulator.result(ridge)


def test_streaming_in_pieces_equals_the_mean_over_all_counted_tokens():
    values, mask = encodings()
    accumulator = CovarianceAccumulator(WIDTH, "words", "encoder")
    for start in range(0, 40, 7):
        accumulator.add(values[start : start + 7], mask[start : start + 7])
    found = accumulator.result()
    rows = values[mask].double()
    expected = torch.einsum("n d, n e -> d e", rows, rows) / len(rows)
    torch.testing.assert_close(found.matrix, expected, rtol=1e-13, atol=1e-13)
    assert (found.tokens, found.captions) == (int(mask.sum()), 40)


def test_all_positions_count_padding_too():
    values, _ = encodings()
    found = measured("all")
    rows = values.flatten(0, 1).double()
    torch.testing.assert_close(found.matrix, rows.mT @ rows / len(rows))
    assert found.tokens == 280


def test_the_dual_solves_the_regularised_system():
    found = measured(ridge=1e-2)
    i = torch.randn(WIDTH, dtype=torch.float64)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    system = found.matrix + 1e-2 * found.matrix.trace() / WIDTH * eye
    torch.testing.assert_close(system @ found.dual(i), i, rtol=1e-12, atol=1e-12)
    assert found.dual(i.float()).dtype == torch.float64


def test_the_scale_of_the_encodings_changes_no_similarity():
    tokens = torch.randn(5, WIDTH, dtype=torch.float64)
    i = torch.randn(WIDTH, dtype=torch.float64)
    one, other = (
        similarities(tokens, [Direction(i, measured(scale=scale).dual(i), Gate(0.6, 0.1))])
        for scale in (1.0, 256.0)
    )
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_condition_number_is_that_of_the_matrix_the_solve_uses():
    matrix = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    found = Covariance(matrix, 2, 1, "all", "encoder", ridge=1e-3)
    assert math.isclose(found.condition_number(), (4 + 1.25e-3) / 1.25e-3, rel_tol=1e-9)


def test_fewer_tokens_than_dimensions_are_solved_through_the_ridge():
    accumulator = CovarianceAccumulator(WIDTH, "all", "encoder")
    accumulator.add(torch.randn(1, 3, WIDTH))
    i = torch.randn(WIDTH)
    assert float(i.double() @ accumulator.result().dual(i)) > 0
    with pytest.raises(ValueError, match=r"not positive definite.*more captions"):
        accumulator.result(ridge=0.0).dual(i)


def test_the_digest_follows_the_content():
    assert measured().digest == measured().digest
    others = [measured("all"), measured(ridge=1e-3), measured(scale=2.0)]
    assert len({measured().digest, *(other.digest for other in others)}) == 4


def test_what_cannot_be_measured_is_refused_with_what_was_found():
    values, mask = encodings()
    accumulator = CovarianceAccumulator(WIDTH, "words", "encoder")
    with pytest.raises(ValueError, match=r"needs a bool mask .*found none"):
        accumulator.add(values)
    with pytest.raises(ValueError, match=r"\(B, N, 16\), found \(40, 7, 15\)"):
        accumulator.add(values[..., 1:], mask)
    with pytest.raises(ValueError, match="NaN"):
        accumulator.add(values * math.nan, mask)
    with pytest.raises(ValueError, match="at least one token"):
        accumulator.result()
    with pytest.raises(ValueError, match="'words' or 'all', found 'some'"):
        CovarianceAccumulator(WIDTH, "some", "encoder")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(16,\).*found \(17,\)"):
        measured().dual(torch.ones(WIDTH + 1))
    with pytest.raises(ValueError, match="square fp64"):
        Covariance(torch.eye(4), 1, 1, "all", "encoder")
    with pytest.raises(ValueError, match="positive trace"):
        Covariance(torch.zeros(4, 4, dtype=torch.float64), 1, 1, "all", "encoder")
    with pytest.raises(ValueError, match="NaN"):
        Covariance(torch.eye(4, dtype=torch.float64) * math.nan, 1, 1, "all", "encoder")


def test_padding_that_holds_nan_does_not_count_among_the_words():
    values, mask = encodings()
    values[~mask] = math.nan
    accumulator = CovarianceAccumulator(WIDTH, "words", "encoder")
    accumulator.add(values, mask)
    torch.testing.assert_close(accumulator.result().matrix, measured().matrix)
