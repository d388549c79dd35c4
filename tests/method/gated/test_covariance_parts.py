"""Two text encoders in one covariance: each solved by itself, one direction for both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from perfusion.gated.covariance import Covariance, CovarianceAccumulator
from perfusion.gated.gate import Gate
from perfusion.gated.rank_one import Direction, similarities

PARTS = (6, 10)
WIDTH = sum(PARTS)


def tokens(scales=(1.0, 1.0), seed=0):
    """Tokens (1, 90, WIDTH) of two encoders, each in columns of its own."""
    random = torch.Generator().manual_seed(seed)
    first, second = (
        scale * torch.randn(count, width, generator=random, dtype=torch.float64)
        for scale, count, width in zip(scales, (30, 60), PARTS, strict=True)
    )
    return torch.block_diag(first, second)[None]


def measured(scales=(1.0, 1.0), ridge=1e-2) -> Covariance:
    accumulator = CovarianceAccumulator(WIDTH, "all", "two encoders", PARTS)
    accumulator.add(tokens(scales))
    return accumulator.result(ridge)


def concept(scales=(1.0, 1.0)):
    """The concept's own token in each encoder, (2, WIDTH)."""
    every = tokens(scales, seed=1)[0]
    return torch.stack([every[0], every[-1]])


def similarity(scales, encodings):
    i = concept(scales).mean(0)
    direction = Direction(i, measured(scales).dual(i), Gate(0.5, 0.1))
    return similarities(encodings, [direction])[..., 0]


@pytest.mark.parametrize("scales", [(1.0, 1.0), (30.0, 0.02)])
def test_the_concepts_own_token_has_similarity_one_in_every_encoder(scales):
    found = similarity(scales, concept(scales))
    torch.testing.assert_close(found, torch.ones(2, dtype=torch.float64))


def test_no_similarity_depends_on_how_loud_an_encoder_is():
    quiet, loud = (1.0, 1.0), (1.0, 4096.0)
    found, expected = (similarity(scales, tokens(scales, seed=2)) for scales in (loud, quiet))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_in_each_encoder_similarities_are_those_of_that_encoder_alone():
    rows = tokens(seed=2)[0]
    found = similarity((1.0, 1.0), rows)
    start = 0
    for own, width, chosen in zip(concept(), PARTS, (rows[:30], rows[30:]), strict=True):
        columns = slice(start, start + width)
        alone = replace(measured(), matrix=measured().matrix[columns, columns], parts=())
        direction = Direction(own[columns], alone.dual(own[columns]), Gate(0.5, 0.1))
        expected = similarities(chosen[:, columns], [direction])[:, 0]
        at = slice(0, 30) if start == 0 else slice(30, 90)
        torch.testing.assert_close(found[at], expected)
        start += width


def test_a_concept_that_one_encoder_does_not_name_is_refused():
    with pytest.raises(ValueError, match="a share in each of the parts"):
        measured().dual(concept()[0])


def test_parts_that_are_not_those_of_the_matrix_are_refused():
    with pytest.raises(ValueError, match="add up to 16"):
        replace(measured(), parts=(6, 9))
    with pytest.raises(ValueError, match="no moments between the parts"):
        replace(measured(), parts=(5, 11))
    silent = torch.block_diag(measured().matrix[:6, :6], torch.zeros(10, 10, dtype=torch.float64))
    with pytest.raises(ValueError, match="positive trace in every part"):
        replace(measured(), matrix=silent)
