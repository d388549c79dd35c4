"""Several concepts in one module: merged, and trained further."""

from __future__ import annotations

import pytest
import torch

from perfusion import (
    Rank1EditModule,
    merge_rank1_edit_modules,
)
from perfusion.gated.gate import Gate
from perfusion.gated.rank_one import Direction, edit_projection
from tests.method.modules.small_modules import (
    FEATURES,
    TOKENS,
    WIDTH,
    batch_for,
    covariance_matrix,
    projection,
    ready,
    train_once,
)


@pytest.mark.parametrize("count", [2, 3])
def test_merged_concepts_each_lose_their_own_input_entirely_and_give_their_own_output(count):
    linear = projection()
    random = torch.Generator().manual_seed(9)
    base = torch.randn(WIDTH, generator=random)
    modules = []
    for number in range(count):
        # Inputs with much in common, and another covariance for each.
        i = 0.7 * base + torch.randn(WIDTH, generator=random)
        module = Rank1EditModule(linear, C=covariance_matrix(number))
        module.inputs.set(0, i, i)
        module.set_outputs(0, torch.randn(FEATURES, generator=random))
        modules.append(module)
    merged = merge_rank1_edit_modules(*modules)
    assert not merged.training
    assert merged.num_concepts == count
    ids = tuple(range(count))
    with torch.no_grad():
        found = merged(merged.inputs.i, concept_id=ids)
        directions = [
            Direction(merged.inputs.i[c], merged.inputs.u[c], Gate()) for c in range(count)
        ]
        duals = merged.inputs.u.double()
        energies = (duals * merged.inputs.i.double()).sum(-1)
        similarity = merged.inputs.i.double() @ duals.mT / energies
        gates = torch.sigmoid((similarity - 0.65) / 0.15).float()
    torch.testing.assert_close(found, gates @ merged.concept_outputs, rtol=1e-4, atol=1e-4)
    expected = edit_projection(
        linear.weight, merged.inputs.i, directions, merged.concept_outputs
    ).detach()
    torch.testing.assert_close(found, expected)


def test_one_concept_of_a_merged_module_gives_what_its_own_module_gave():
    linear = projection()
    one, other = (ready(Rank1EditModule(linear, C=covariance_matrix()), seed) for seed in (1, 2))
    merged = merge_rank1_edit_modules(one, other)
    text_enc = torch.randn(2, TOKENS, WIDTH)
    torch.testing.assert_close(merged(text_enc, concept_id=0), one(text_enc))
    torch.testing.assert_close(merged(text_enc, concept_id=1), other(text_enc))
    torch.testing.assert_close(
        merged(text_enc, concept_id=(0, 1)), merged(text_enc, concept_id=(1, 0))
    )


def test_modules_that_do_not_belong_together_are_not_merged():
    values = ready(Rank1EditModule(projection(), C=covariance_matrix()))
    keys = ready(Rank1EditModule(values.linear, is_key_proj=True, C=covariance_matrix()))
    with pytest.raises(ValueError, match="either keys or values"):
        merge_rank1_edit_modules(values, keys)
    with pytest.raises(ValueError, match="different weights"):
        merge_rank1_edit_modules(values, ready(Rank1EditModule(projection())))
    wide = Rank1EditModule(projection(features=21))
    wide.inputs.set(0, torch.randn(WIDTH), torch.randn(WIDTH))
    wide.set_outputs(0, torch.randn(21))
    with pytest.raises(ValueError, match=r"\(20, 48\) and \(21, 48\)"):
        merge_rank1_edit_modules(values, wide)
    with pytest.raises(ValueError, match="concept 0 is empty"):
        merge_rank1_edit_modules(values, Rank1EditModule(values.linear))
    with pytest.raises(ValueError, match="found none"):
        merge_rank1_edit_modules()


def test_merged_modules_of_one_covariance_tensor_are_trained_further_with_it():
    linear, matrix = projection(), covariance_matrix()
    one, other = (Rank1EditModule(linear, C=matrix) for _ in range(2))
    for module in (one, other):
        train_once(module)
    merged = merge_rank1_edit_modules(one, other).train()
    for concept in (0, 1):
        merged(**batch_for(concept, 7 + concept))
        expected = torch.linalg.solve(
            matrix + 1e-4 * matrix.trace() / WIDTH * torch.eye(WIDTH), merged.inputs.i[concept]
        )
        cosine = torch.cosine_similarity(merged.inputs.u[concept], expected, dim=0)
        assert float(cosine) > 0.9999
        plain = torch.cosine_similarity(merged.inputs.i[concept], expected, dim=0)
        assert float(plain) < 0.9


def test_merged_modules_of_different_covariances_are_each_trained_further_with_their_own():
    linear = projection()
    first, second = Rank1EditModule(linear, C=covariance_matrix(1)), Rank1EditModule(linear)
    train_once(first)
    train_once(second)
    merged = merge_rank1_edit_modules(first, second).train()
    merged(**batch_for(0, 8))
    merged(**batch_for(1, 9))
    first(**batch_for(0, 8))
    torch.testing.assert_close(merged.inputs.u[0], first.inputs.u[0])
    torch.testing.assert_close(merged.inputs.u[1], merged.inputs.i[1])


def test_a_concept_is_not_trained_further_without_the_covariance_it_was_made_with():
    module = ready(Rank1EditModule(projection(), C=covariance_matrix()))
    bare = Rank1EditModule(projection())
    bare.load_state_dict(module.state_dict())
    before = bare.inputs.u.clone()
    with pytest.raises(ValueError, match=r"trained with a covariance.*pass C="):
        train_once(bare)
    assert torch.equal(bare.inputs.u, before)
