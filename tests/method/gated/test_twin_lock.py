"""Twin lock as pure functions: what it promises, to the last bit where it promises that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perfusion.gated.gate import Gate
from perfusion.gated.rank_one import Direction, combine
from perfusion.gated.twin_lock import (
    TwinProjections,
    combine_twins,
    twin_direction,
    twin_gates,
    twin_inputs,
    twin_projection,
)

WIDTH, FEATURES, TOKENS = 24, 16, 9
HALVES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def concepts(random: torch.Generator, *gates: Gate) -> list[Direction]:
    samples = normal(random, 200, WIDTH)
    metric = samples.mT @ samples / 200
    inputs = normal(random, len(gates), WIDTH)
    return [
        Direction(i, torch.linalg.solve(metric, i), gate, name=f"<{number}>")
        for number, (i, gate) in enumerate(zip(inputs, gates, strict=True))
    ]


def prompts(random: torch.Generator, directions: list[Direction]) -> tuple[Tensor, Tensor]:
    """Two prompts and their twins: the first names every concept in turn, the second none."""
    twin = normal(random, 2, TOKENS, WIDTH)
    encodings = twin.clone()
    for at, direction in enumerate(directions):
        encodings[0, 2 + at] += direction.i
    return encodings, twin


@pytest.mark.parametrize("dtype", HALVES)
def test_a_prompt_that_names_no_concept_is_the_base_models_to_the_last_bit(random, dtype):
    directions = concepts(random, Gate(-5.0, 0.1), Gate(0.5, 0.3, 1.7))
    encodings, twin = (each.to(dtype) for each in prompts(random, directions))
    weight, outputs = normal(random, FEATURES, WIDTH).to(dtype), normal(random, 2, FEATURES)
    found = twin_projection(weight, encodings, twin, directions, outputs.to(dtype))
    plain = torch.nn.functional.linear(twin, weight)
    assert torch.equal(found[1], plain[1])
    # Beside it, in the same batch, the gates are wide open where the concepts are named.
    assert not torch.equal(found[0, 2:4], plain[0, 2:4])
    assert torch.equal(found[0, :2], plain[0, :2])
    assert torch.equal(found[0, 4:], plain[0, 4:])


def test_an_open_gate_gives_the_output_and_a_shut_one_the_twin(random):
    (opened,) = concepts(random, Gate(-1e3, 0.1))
    encodings, twin = prompts(random, [opened])
    weight, o = normal(random, FEATURES, WIDTH), normal(random, 1, FEATURES)
    found = twin_projection(weight, encodings, twin, [opened], o)
    torch.testing.assert_close(found[0, 2], o[0])
    shut = Direction(opened.i, opened.u, Gate(1e3, 0.1))
    found = twin_projection(weight, encodings, twin, [shut], o)
    torch.testing.assert_close(found, twin @ weight.mT)


def similarities_by_hand(directions: list[Direction], change: Tensor) -> Tensor:
    """What of a change (D,) each concept's word explains, averaged over the levels of strength."""
    found = torch.zeros(len(directions), dtype=torch.float64)
    below = 0.0
    for level in sorted({d.gate.strength for d in directions}):
        chosen = [at for at, d in enumerate(directions) if d.gate.strength >= level]
        mixed = torch.stack([directions[at].i for at in chosen], dim=-1)
        duals = torch.stack([directions[at].u for at in chosen])
        for at, s in zip(chosen, torch.linalg.solve(duals @ mixed, duals @ change), strict=True):
            found[at] += (level - below) / directions[at].gate.strength * s
        below = level
    return found


def test_a_concepts_word_opens_no_other_concepts_gate_however_alike_the_changes(random):
    first, second = normal(random, 2, WIDTH)
    alike = first + 0.5 * second
    change = [twin_direction(i, 0 * i, Gate(0.5, 0.01), f"<{i[0]}>") for i in (first, alike)]
    twin = normal(random, 1, 3, WIDTH)
    encodings = twin.clone()
    encodings[0, 1] += first
    encodings[0, 2] += alike
    gates = twin_gates(encodings, twin, change)[0]
    torch.testing.assert_close(gates, torch.tensor([[0, 0], [1, 0], [0, 1.0]]).to(gates))
    # By itself each would have opened at the word of the other.
    apart = [twin_gates(encodings, twin, [each])[0, 1:, 0] for each in change]
    assert all((gate > 0.9).all() for gate in apart)


def test_one_concept_is_compared_as_before_to_the_last_bit(random):
    (only,) = concepts(random, Gate(0.5, 0.2, 0.7))
    encodings, twin = prompts(random, [only])
    assert torch.equal(combine_twins([only]).duals, combine([only]).duals)
    assert torch.equal(
        twin_gates(encodings, twin, [only]), twin_gates(encodings, twin, combine([only]))
    )


def test_the_formula_is_the_one_written_down(random):
    gates = Gate(0.4, 0.3), Gate(0.7, 0.2, 0.6), Gate(0.1, 0.5, 1.5)
    directions = concepts(random, *gates)
    encodings, twin = prompts(random, directions)
    encodings[0, 7] += 0.7 * directions[0].i + 0.8 * directions[2].i
    weight, outputs = normal(random, FEATURES, WIDTH), normal(random, 3, FEATURES)
    expected = torch.empty(2, TOKENS, FEATURES, dtype=torch.float64)
    for row in range(2):
        for at in range(TOKENS):
            e, t = encodings[row, at], twin[row, at]
            s = similarities_by_hand(directions, e - t)
            g = [
                torch.sigmoid((x - d.gate.bias) / d.gate.temperature) * float(bool((e != t).any()))
                for x, d in zip(s, directions, strict=True)
            ]
            over = max(
                1.0,
                float(sum(min(d.gate.strength, 1) * x for d, x in zip(directions, g, strict=True))),
            )
            a = [d.gate.strength * x / over for d, x in zip(directions, g, strict=True)]
            expected[row, at] = weight @ (t * (1 - sum(a)))
            expected[row, at] += sum(x * o for x, o in zip(a, outputs, strict=True))
    found = twin_projection(weight, encodings, twin, directions, outputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 1.8])
def test_the_strength_of_one_concept_blends_with_the_twin(random, strength):
    (full,) = concepts(random, Gate(0.5, 0.2))
    encodings, twin = prompts(random, [full])
    weight, o = normal(random, FEATURES, WIDTH), normal(random, 1, FEATURES)
    part = Direction(full.i, full.u, Gate(0.5, 0.2, strength))
    found = twin_projection(weight, encodings, twin, [part], o)
    whole = twin_projection(weight, encodings, twin, [full], o)
    plain = torch.nn.functional.linear(twin, weight)
    torch.testing.assert_close(found, (1 - strength) * plain + strength * whole)


# Open, so that both have to share a token; half open, so that it shows what is compared.
@pytest.mark.parametrize("gate", [(-2.0, 0.1), (0.5, 0.2)])
def test_a_strength_that_goes_to_nothing_meets_a_concept_left_out(random, gate):
    first, second = concepts(random, Gate(*gate), Gate(*gate))
    encodings, twin = prompts(random, [first, second])
    weight, outputs = normal(random, FEATURES, WIDTH), normal(random, 2, FEATURES)
    alone = twin_projection(weight, encodings, twin, [first], outputs[:1])
    for strength in (0.0, 1e-9, -1e-9):
        faint = Direction(second.i, second.u, Gate(*gate, strength))
        found = twin_projection(weight, encodings, twin, [first, faint], outputs)
        torch.testing.assert_close(found, alone, rtol=1e-7, atol=1e-7)


def test_gates_open_at_one_token_never_add_up_to_more_than_one(random):
    directions = concepts(random, Gate(-9.0, 0.1), Gate(-9.0, 0.1), Gate(-9.0, 0.1))
    encodings, twin = prompts(random, directions)
    found = twin_gates(encodings, twin, directions)
    torch.testing.assert_close(found[0, 2:5].sum(-1), torch.ones(3, dtype=torch.float64))
    assert bool((found[0, :2] == 0).all())


def test_the_value_for_training_is_the_pure_function(random):
    directions = concepts(random, Gate(0.6, 0.2), Gate(0.5, 0.1))
    encodings, twin = prompts(random, directions)
    weight, outputs = normal(random, FEATURES, WIDTH), normal(random, 2, FEATURES)
    gates = twin_gates(encodings, twin, combine_twins(directions))
    made = TwinProjections(twin, twin_inputs(twin, gates), gates, {"a.attn2": outputs})

    def linear(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight)

    expected = twin_projection(weight, encodings, twin, directions, outputs)
    torch.testing.assert_close(made.apply(linear, "a.attn2", "v"), expected)
    assert torch.equal(made.apply(linear, "a.attn2", "k"), linear(twin))


def test_gradients_reach_the_outputs_and_nothing_before_them(random):
    directions = concepts(random, Gate(0.6, 0.2))
    encodings, twin = prompts(random, directions)
    outputs = normal(random, 1, FEATURES).requires_grad_()
    gates = twin_gates(encodings, twin, directions)
    made = TwinProjections(twin, twin_inputs(twin, gates), gates, {"a": outputs})
    assert not made.inputs.requires_grad
    made.apply(lambda x: x[..., :FEATURES], "a", "v").sum().backward()
    assert outputs.grad is not None
    torch.testing.assert_close(outputs.grad[0], gates.sum().expand(FEATURES))


def test_what_a_place_in_a_sentence_does_to_both_words_moves_no_gate(random):
    superclass = 10 * normal(random, WIDTH)
    words = [superclass + normal(random, WIDTH) for _ in range(2)]
    concepts = [twin_direction(word, superclass, Gate(0.65, 0.15)) for word in words]
    places = 5 * normal(random, 1, TOKENS, WIDTH)
    twin = superclass + places
    found = twin_gates(words[0] + places, twin, concepts)
    at_once = twin_gates(words[0].expand(1, TOKENS, -1), superclass.expand_as(twin), concepts)
    torch.testing.assert_close(found, at_once)
    assert float(at_once[..., 0].min()) > 0.9
    assert float(at_once[..., 1].max()) < 0.5


def test_a_word_is_known_in_each_of_several_text_encoders_however_strong_one_speaks(random):
    parts = WIDTH // 3, WIDTH - WIDTH // 3
    changes = [normal(random, width) * scale for width, scale in zip(parts, (1, 50), strict=True)]
    twin = normal(random, 1, 2, WIDTH)
    twin[0, 0, parts[0] :] = twin[0, 1, : parts[0]] = 0
    encodings = twin.clone()
    encodings[0, 0, : parts[0]] += changes[0]
    encodings[0, 1, parts[0] :] += changes[1]
    gate = Gate(0.65, 0.15)
    direction = twin_direction(encodings.mean(1)[0], twin.mean(1)[0], gate, parts=parts)
    found = twin_gates(encodings, twin, [direction])
    expected = torch.sigmoid(torch.tensor((1 - gate.bias) / gate.temperature, dtype=torch.float64))
    torch.testing.assert_close(found, expected.expand(1, 2, 1))


def test_a_twin_of_another_shape_is_refused_naming_both(random):
    directions = concepts(random, Gate())
    encodings, twin = prompts(random, directions)
    with pytest.raises(ValueError, match=r"\(2, 9, 24\) and \(2, 8, 24\)"):
        twin_gates(encodings, twin[:, 1:], directions)


def test_parallel_concepts_are_refused(random):
    (one,) = concepts(random, Gate())
    encodings, twin = prompts(random, [one])
    with pytest.raises(ValueError, match="parallel"):
        twin_gates(encodings, twin, [one, one])
