"""The gated edit against an independent fp64 reference and its own identities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from perfusion.gated.gate import Gate
from perfusion.gated.rank_one import (
    Direction,
    GatedProjections,
    active_directions,
    combine,
    edit_projection,
    gated_inputs,
    project,
    similarities,
)

WIDTH, FEATURES = 24, 10


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def covariance(random: torch.Generator) -> Tensor:
    samples = normal(random, 200, WIDTH) * torch.logspace(-1, 1, WIDTH, dtype=torch.float64)
    return samples.mT @ samples / 200


def directions_for(metric: Tensor, inputs: Tensor, **gate: float) -> list[Direction]:
    return [
        Direction(i, torch.linalg.solve(metric, i), Gate(**gate), name=f"concept-{number}")
        for number, i in enumerate(inputs)
    ]


def paper_form(
    weight: Tensor, encodings: Tensor, metric: Tensor, inputs: Tensor, outputs: Tensor, gate: tuple
) -> Tensor:
    """Appendix B as printed: whiten with the Cholesky root of C^-1, orthonormalise, project out."""
    root = torch.linalg.cholesky(torch.linalg.inv(metric))
    basis, _ = torch.linalg.qr(root.mT @ inputs.mT)
    white = encodings @ root
    left = white - (white @ basis) @ basis.mT
    back = torch.linalg.solve(root.mT, left.flatten(0, -2).mT).mT.reshape(left.shape)
    hidden = back @ weight.mT
    for i, o in zip(inputs, outputs, strict=True):
        white_i = root.mT @ i
        similarity = white @ white_i / (white_i @ white_i)
        opened = 1 / (1 + torch.exp(-(similarity - gate[0]) / gate[1]))
        hidden = hidden + opened[..., None] * o
    return hidden


@pytest.mark.parametrize("concepts", [1, 2, 3])
def test_the_edit_equals_the_papers_cholesky_form_in_fp64(concepts, random):
    metric, weight = covariance(random), normal(random, FEATURES, WIDTH)
    inputs, outputs = normal(random, concepts, WIDTH), normal(random, concepts, FEATURES)
    encodings = normal(random, 2, 9, WIDTH)
    encodings[0, 3] = inputs[0]
    expected = paper_form(weight, encodings, metric, inputs, outputs, (0.65, 0.15))
    found = edit_projection(weight, encodings, directions_for(metric, inputs), outputs)
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-12


def test_one_concept_equals_equation_three_token_by_token(random):
    metric, weight = covariance(random), normal(random, FEATURES, WIDTH)
    i, o = normal(random, WIDTH), normal(random, FEATURES)
    encodings = normal(random, 5, WIDTH)
    u = torch.linalg.inv(metric) @ i
    rows = []
    for e in encodings:
        s = float(u @ e) / float(u @ i)
        rows.append(weight @ (e - s * i) + o / (1 + math.exp(-(s - 0.65) / 0.15)))
    found = edit_projection(weight, encodings, directions_for(metric, i[None]), o[None])
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-11, atol=1e-11)


def test_concepts_with_their_own_covariances_each_lose_their_own_input_entirely(random):
    inputs = normal(random, 2, WIDTH)
    inputs[1] = 0.6 * inputs[0] + 0.8 * inputs[1]
    pair = [
        directions_for(covariance(random), inputs)[0],
        directions_for(covariance(random), inputs)[1],
    ]
    left, _ = gated_inputs(inputs, pair)
    assert float(left.norm() / inputs.norm()) < 1e-10


def test_the_scale_of_the_covariance_does_not_matter(random):
    metric, inputs = covariance(random), normal(random, 2, WIDTH)
    encodings = normal(random, 4, WIDTH)
    small = gated_inputs(encodings, directions_for(metric, inputs))
    large = gated_inputs(encodings, directions_for(metric * 4096, inputs))
    for one, other in zip(small, large, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_rescaling_the_dual_of_one_concept_among_several_does_not_matter(random):
    metric, inputs = covariance(random), normal(random, 2, WIDTH)
    first, second = directions_for(metric, inputs)
    rescaled = Direction(second.i, second.u * 1e-3, second.gate)
    encodings = normal(random, 4, WIDTH)
    for one, other in zip(
        gated_inputs(encodings, [first, second]),
        gated_inputs(encodings, [first, rescaled]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_the_input_itself_has_similarity_one_and_leaves_only_the_gated_output(random):
    metric, weight = covariance(random), normal(random, FEATURES, WIDTH)
    i, o = normal(random, 1, WIDTH), normal(random, 1, FEATURES)
    directions = directions_for(metric, i)
    torch.testing.assert_close(similarities(i, directions), torch.ones(1, 1, dtype=torch.float64))
    opened = 1 / (1 + math.exp(-(1 - 0.65) / 0.15))
    found = edit_projection(weight, i, directions, o)
    torch.testing.assert_close(found, opened * o, rtol=1e-10, atol=1e-10)


def test_a_bias_towards_infinity_leaves_only_the_subtraction(random):
    metric, weight = covariance(random), normal(random, FEATURES, WIDTH)
    i, o, encodings = normal(random, WIDTH), normal(random, FEATURES), normal(random, 6, WIDTH)
    u = torch.linalg.solve(metric, i)
    subtracted = (encodings - (encodings @ u / (i @ u))[:, None] * i) @ weight.mT
    found = edit_projection(weight, encodings, directions_for(metric, i[None], bias=1e6), o[None])
    torch.testing.assert_close(found, subtracted, rtol=1e-10, atol=1e-10)


def test_a_bias_towards_minus_infinity_adds_the_whole_output_to_every_token(random):
    metric, weight = covariance(random), normal(random, FEATURES, WIDTH)
    i, o, encodings = normal(random, WIDTH), normal(random, FEATURES), normal(random, 6, WIDTH)
    closed = edit_projection(weight, encodings, directions_for(metric, i[None], bias=1e6), o[None])
    opened = edit_projection(weight, encodings, directions_for(metric, i[None], bias=-1e6), o[None])
    torch.testing.assert_close(opened - closed, o.expand(6, -1), rtol=1e-10, atol=1e-10)


def test_strength_blends_the_edit_with_the_plain_projection(random):
    metric, weight = covariance(random), normal(random, FEATURES, WIDTH)
    i, o, encodings = (
        normal(random, 1, WIDTH),
        normal(random, 1, FEATURES),
        normal(random, 6, WIDTH),
    )
    whole = edit_projection(weight, encodings, directions_for(metric, i), o)
    part = edit_projection(weight, encodings, directions_for(metric, i, strength=0.3), o)
    torch.testing.assert_close(
        part, 0.7 * encodings @ weight.mT + 0.3 * whole, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_strength_zero_is_bit_identical_to_no_edit(dtype, random):
    metric = covariance(random)
    weight, encodings = (normal(random, n, WIDTH).to(dtype) for n in (FEATURES, 6))
    outputs = normal(random, 2, FEATURES)
    directions = directions_for(metric, normal(random, 2, WIDTH), strength=0.0)
    assert active_directions(directions) == []
    plain = functional.linear(encodings, weight)
    assert torch.equal(edit_projection(weight, encodings, directions, outputs), plain)
    inputs, gates = gated_inputs(encodings, directions)
    assert torch.equal(inputs, encodings)
    assert not gates.any()


def test_a_concept_of_strength_zero_takes_no_part_even_when_parallel(random):
    metric, weight = covariance(random), normal(random, FEATURES, WIDTH)
    i, outputs = normal(random, 1, WIDTH), normal(random, 2, FEATURES)
    encodings = normal(random, 6, WIDTH)
    active = directions_for(metric, i)
    silent = directions_for(metric, i, strength=0.0)
    both = edit_projection(weight, encodings, active + silent, outputs)
    assert torch.equal(both, edit_projection(weight, encodings, active, outputs[:1]))
    inputs, gates = gated_inputs(encodings, active + silent)
    torch.testing.assert_close(inputs, gated_inputs(encodings, active)[0])
    assert gates.shape == (6, 2)
    assert not gates[:, 1].any()


def test_two_parallel_concepts_are_refused_by_name(random):
    metric, i = covariance(random), normal(random, WIDTH)
    others = normal(random, 1, WIDTH)
    inputs = torch.stack([i, others[0], 3 * i + 1e-4 * others[0]])
    with pytest.raises(ValueError, match=r"'concept-0' and 'concept-2' are .*parallel"):
        combine(directions_for(metric, inputs))


def test_concepts_that_only_together_are_dependent_are_refused_by_name(random):
    metric, inputs = covariance(random), normal(random, 3, WIDTH)
    dependent = torch.cat([inputs, (inputs[0] - inputs[2])[None]])
    with pytest.raises(ValueError, match="'concept-0' and 'concept-2' and 'concept-3'"):
        combine(directions_for(metric, dependent))


def test_neighbouring_concepts_that_can_be_told_apart_are_accepted(random):
    metric, inputs = covariance(random), normal(random, 2, WIDTH)
    close = torch.stack([inputs[0], inputs[0] + 0.2 * inputs[1]])
    left, _ = gated_inputs(close, directions_for(metric, close))
    assert float(left.norm() / close.norm()) < 1e-8


def test_bad_directions_are_refused_with_both_sides_named(random):
    i = normal(random, WIDTH)
    with pytest.raises(ValueError, match=r"'sks'.*\(24,\).*\(23,\)"):
        Direction(i, i[1:], Gate(0.6, 0.1), name="sks")
    with pytest.raises(ValueError, match="positive finite energy"):
        combine([Direction(i, -i, Gate(0.6, 0.1))])
    with pytest.raises(ValueError, match="positive finite energy"):
        combine([Direction(i * math.nan, i, Gate(0.6, 0.1))])
    with pytest.raises(ValueError, match="found none"):
        combine([])
    with pytest.raises(ValueError, match="'a' has 24, 'b' has 23"):
        combine(
            [
                Direction(i, i, Gate(0.6, 0.1), name="a"),
                Direction(i[1:], i[1:], Gate(0.6, 0.1), name="b"),
            ]
        )
    with pytest.raises(ValueError, match=r"width 24.*found 23"):
        gated_inputs(normal(random, 4, 23), [Direction(i, i, Gate(0.6, 0.1))])
    with pytest.raises(ValueError, match=r"\(1, 10\).*found \(2, 10\)"):
        edit_projection(
            normal(random, FEATURES, WIDTH),
            normal(random, 4, WIDTH),
            [Direction(i, i, Gate(0.6, 0.1))],
            normal(random, 2, FEATURES),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_keeps_its_dtype_and_agrees_with_fp64(dtype, random):
    metric, weight = covariance(random), normal(random, FEATURES, WIDTH)
    inputs, outputs = normal(random, 2, WIDTH), normal(random, 2, FEATURES)
    encodings = normal(random, 2, 9, WIDTH)
    directions = directions_for(metric, inputs)
    expected = edit_projection(weight, encodings, directions, outputs)
    found = edit_projection(weight.to(dtype), encodings.to(dtype), directions, outputs.to(dtype))
    assert found.dtype == dtype
    # Roundings of a sum of WIDTH products, relative to the largest entry.
    tolerance = WIDTH**0.5 * torch.finfo(dtype).eps
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
    _, gates = gated_inputs(encodings.to(dtype), directions)
    assert gates.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1,), (77,), (1, 154), (2, 3, 5)])
def test_any_number_of_tokens_and_any_leading_shape_is_edited_token_by_token(shape, random):
    directions = directions_for(covariance(random), normal(random, 2, WIDTH))
    encodings = normal(random, *shape, WIDTH)
    inputs, gates = gated_inputs(encodings, directions)
    flat_inputs, flat_gates = gated_inputs(encodings.reshape(-1, WIDTH), directions)
    assert gates.shape == (*shape, 2)
    torch.testing.assert_close(inputs.reshape(-1, WIDTH), flat_inputs)
    torch.testing.assert_close(gates.reshape(-1, 2), flat_gates)


def test_a_combined_basis_gives_the_same_as_its_directions(random):
    directions = directions_for(covariance(random), normal(random, 3, WIDTH))
    encodings = normal(random, 2, 9, WIDTH).float()
    for one, other in zip(
        gated_inputs(encodings, combine(directions)),
        gated_inputs(encodings, directions),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_gated_edit_calls_the_layers_own_forward_with_the_outputs_of_its_part(random):
    linear = nn.Linear(WIDTH, FEATURES, bias=False, dtype=torch.float64)
    directions = directions_for(covariance(random), normal(random, 1, WIDTH))
    encodings, outputs = normal(random, 2, 9, WIDTH), normal(random, 2, 1, FEATURES)
    inputs, gates = gated_inputs(encodings, directions)
    edit = GatedProjections(inputs, gates, {"attn2": outputs[0]}, {"attn2": outputs[1]})

    def doubled(x: Tensor) -> Tensor:
        return 2 * linear(x)

    for part, o in (("k", outputs[0]), ("v", outputs[1])):
        expected = edit_projection(2 * linear.weight, encodings, directions, o)
        torch.testing.assert_close(edit.apply(doubled, "attn2", part), expected)


def test_gradients_agree_with_finite_differences_in_fp64(random):
    metric, weight = covariance(random), normal(random, FEATURES, WIDTH)
    directions = directions_for(metric, normal(random, 2, WIDTH))
    encodings = normal(random, 3, WIDTH).requires_grad_()
    outputs = normal(random, 2, FEATURES).requires_grad_()

    def edited(e: Tensor, o: Tensor) -> Tensor:
        inputs, gates = gated_inputs(e, directions)
        return project(lambda x: functional.linear(x, weight), inputs, gates, o)

    assert torch.autograd.gradcheck(edited, (encodings, outputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_make_the_similarities_coarser(dtype, random):
    metric, inputs = covariance(random), normal(random, 2, WIDTH)
    directions = directions_for(metric, inputs)
    encodings = normal(random, 3, 7, WIDTH).to(dtype)
    outside = *gated_inputs(encodings, directions), similarities(encodings, directions)
    with torch.autocast("cpu", torch.bfloat16):
        inside = *gated_inputs(encodings, directions), similarities(encodings, directions)
    for found, expected in zip(inside, outside, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
