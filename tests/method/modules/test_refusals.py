"""Bad input to the edit modules is refused in a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from perfusion import (
    ConceptInputs,
    Rank1EditModule,
)
from tests.method.modules.small_modules import (
    FEATURES,
    WIDTH,
    covariance_matrix,
    projection,
    ready,
    train_once,
)


def test_shapes_that_do_not_fit_are_refused_with_both():
    module = ready(Rank1EditModule(projection(), C=covariance_matrix()))
    with pytest.raises(ValueError, match=r"\(B, N, 48\), found \(2, 5, 47\)"):
        module(torch.randn(2, 5, 47))
    with pytest.raises(ValueError, match=r"\(48, 48\).*found \(47, 47\)"):
        Rank1EditModule(projection(), C=torch.eye(47))
    with pytest.raises(ValueError, match=r"width 48, found 47"):
        Rank1EditModule(projection(), inputs=ConceptInputs(47))
    module.train()
    text_enc = torch.randn(2, 5, WIDTH)
    with pytest.raises(ValueError, match=r"\(2, 5, 48\) and \(3,\)"):
        module(text_enc, concept_indices=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"\(2, 5, 48\).*found \(2, 6, 48\)"):
        module(
            text_enc,
            concept_indices=torch.tensor([0, 1]),
            text_enc_with_superclass=torch.randn(2, 6, WIDTH),
        )
    with pytest.raises(ValueError, match=r"outputs: expected \(20,\), found \(21,\)"):
        module.set_outputs(0, torch.randn(21))
    with pytest.raises(ValueError, match=r"u: expected \(48,\), found \(3,\)"):
        module.inputs.set(0, torch.randn(WIDTH), torch.randn(WIDTH), torch.randn(3))


def test_concepts_and_positions_that_do_not_exist_are_refused():
    module = ready(Rank1EditModule(projection(), C=covariance_matrix(), num_concepts=2))
    text_enc = torch.randn(2, 5, WIDTH)
    for wrong in (2, -1, (0, 2)):
        with pytest.raises(IndexError, match=r"expected 0 to 1 .*found"):
            module(text_enc, concept_id=wrong)
    with pytest.raises(ValueError, match=r"different concepts, found \(1, 1\)"):
        module(text_enc, concept_id=(1, 1))
    module.train()
    with pytest.raises(ValueError, match="one concept at a time in training"):
        module(text_enc, concept_indices=torch.tensor([0, 1]), concept_id=(0, 1))
    for places in ([0, 5], [-1, 2]):
        with pytest.raises(IndexError, match="positions 0 to 4"):
            module(text_enc, concept_indices=torch.tensor(places))


def test_a_concept_that_was_never_trained_is_refused_at_inference():
    module = Rank1EditModule(projection(), C=covariance_matrix(), num_concepts=2)
    text_enc = torch.randn(2, 5, WIDTH)
    with pytest.raises(ValueError, match=r"concept 0 is empty.*training mode first"):
        module.eval()(text_enc)
    module.train()
    with pytest.raises(ValueError, match="text_enc_with_superclass with the first training batch"):
        module(text_enc, concept_indices=torch.tensor([0, 1]))
    train_once(module)
    module.eval()(text_enc, concept_id=0)
    with pytest.raises(ValueError, match="concept 1 is empty"):
        module(text_enc, concept_id=(0, 1))


def test_other_layers_than_linear_ones_and_broken_covariances_are_refused():
    with pytest.raises(TypeError, match=r"nn\.Linear.*found Conv1d"):
        Rank1EditModule(nn.Conv1d(WIDTH, FEATURES, 1))
    for broken in (torch.full((WIDTH, WIDTH), float("nan")), torch.zeros(WIDTH, WIDTH)):
        with pytest.raises(ValueError, match="C: expected a finite covariance"):
            Rank1EditModule(projection(), C=broken)
    module = Rank1EditModule(projection())
    text_enc = torch.full((1, 3, WIDTH), float("nan"))
    with pytest.raises(ValueError, match="expected finite concept encodings"):
        module(text_enc, text_enc, torch.tensor([1]))


def test_a_matrix_without_an_inverse_is_refused_in_a_sentence():
    singular = torch.eye(WIDTH)
    singular[0, 1], singular[0, 0] = 1.0, 0.0
    with pytest.raises(ValueError, match=r"C: expected a covariance.*has no inverse"):
        Rank1EditModule(projection(), C=singular)
