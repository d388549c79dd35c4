"""A concept's gate over the course of sampling, as a value."""

from __future__ import annotations

import pytest
import torch

from perfusion import Concept, Direction, Gate, GateSchedule, combine, gated_inputs, save_concept
from perfusion.gated.rank_one import edited_inputs, open_gates


def concept():
    wide = torch.ones(8)
    return Concept(
        family="sd1",
        placeholder="<a>",
        superclass="cat",
        embeddings={"l": wide},
        i=wide,
        u=wide,
        superclass_encoding=wide,
        o_v={"layer": torch.ones(4)},
    )


def test_the_gate_moves_evenly_between_the_ends_and_stays_there_beyond_them():
    schedule = GateSchedule(0.2, 0.6, (0.4, 0.8), (0.1, 0.3))
    assert schedule.gate(0.2) == pytest.approx((0.4, 0.1))
    assert schedule.gate(0.3) == pytest.approx((0.5, 0.15))
    assert schedule.gate(0.6) == pytest.approx((0.8, 0.3))
    assert schedule.gate(0.0) == schedule.gate(0.2)
    assert schedule.gate(1.0) == schedule.gate(0.6)


@pytest.mark.parametrize(
    ("start", "end"), [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1)]
)
def test_a_range_that_holds_nothing_is_refused(start, end):
    with pytest.raises(ValueError, match="set its strength to 0"):
        GateSchedule(start, end, (0.5, 0.5), (0.1, 0.1))


def test_gates_no_formula_can_take_are_refused():
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        GateSchedule(0, 1, (0.5, 0.5), (0.1, 0.0))
    with pytest.raises(ValueError, match="bias: expected a finite number"):
        GateSchedule(0, 1, (0.5, float("inf")), (0.1, 0.1))


def test_a_schedule_decides_bias_and_temperature_but_not_strength():
    scheduled = concept().with_schedule(GateSchedule(0, 1, (0.5, 0.5), (0.1, 0.1)))
    assert scheduled.with_gate(strength=0.3).gate.strength == 0.3
    with pytest.raises(ValueError, match="set the gate first"):
        scheduled.with_gate(bias=0.4)
    with pytest.raises(ValueError, match="set the gate first"):
        scheduled.with_gate(temperature=0.4)
    assert scheduled.with_schedule(None).with_gate(bias=0.4).gate.bias == 0.4


def test_a_scheduled_concept_is_not_saved_without_its_schedule(tmp_path):
    scheduled = concept().with_schedule(GateSchedule(0, 1, (0.5, 0.5), (0.1, 0.1)))
    with pytest.raises(ValueError, match="'<a>' has a schedule, which a file does not keep"):
        save_concept(scheduled, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_inputs_and_gates_computed_apart_are_those_computed_together():
    generator = torch.Generator().manual_seed(0)
    e, i, j = torch.randn(2, 5, 8, generator=generator), torch.randn(8), torch.randn(8)
    directions = [Direction(i, i, Gate(0.5, 0.1, 0.7)), Direction(j, j, Gate(0.3, 0.2))]
    inputs, similarity, basis = edited_inputs(e, directions)
    together, gates = gated_inputs(e, directions)
    assert torch.equal(inputs, together)
    assert torch.equal(open_gates(similarity, basis), gates)
    moved = combine(directions).with_gates([0.1, 0.2], [0.3, 0.4])
    others = [Direction(i, i, Gate(0.1, 0.3, 0.7)), Direction(j, j, Gate(0.2, 0.4))]
    for found, expected in zip(gated_inputs(e, moved), gated_inputs(e, others), strict=True):
        assert torch.equal(found, expected)
