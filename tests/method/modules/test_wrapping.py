"""Attention modules of a network, wrapped in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from perfusion import (
    Rank1EditModule,
    make_key_value_proj_rank1_edit_modules_,
)
from tests.method.modules.small_modules import (
    FEATURES,
    TOKENS,
    WIDTH,
    covariance_matrix,
    projection,
)


class CrossAttention(nn.Module):
    def __init__(self, key_bias: bool = False) -> None:
        super().__init__()
        self.to_q = nn.Linear(16, FEATURES, bias=False)
        self.to_k = projection(key_bias)
        self.to_v = projection()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_an_attention_is_wrapped_in_place_and_the_next_one_shares_its_inputs():
    first, second, third = CrossAttention(), CrossAttention(), CrossAttention()
    names = {"key_proj_name": "to_k", "value_proj_name": "to_v"}
    inputs = make_key_value_proj_rank1_edit_modules_(
        first, input_covariance=covariance_matrix(), eval_beta=0.5, **names
    )
    again = make_key_value_proj_rank1_edit_modules_(second, inputs=inputs, **names)
    assert again is inputs
    assert isinstance(first.to_k, Rank1EditModule)
    assert first.to_k.is_key_proj
    assert not first.to_v.is_key_proj
    assert float(inputs.gates[0, 0]) == 0.5
    with pytest.raises(TypeError, match="wrapped before"):
        make_key_value_proj_rank1_edit_modules_(first, **names)
    with pytest.raises(TypeError, match=r"to_keys.*nn.Linear in CrossAttention.*NoneType"):
        make_key_value_proj_rank1_edit_modules_(
            third, key_proj_name="to_keys", value_proj_name="to_v"
        )


def test_an_attention_that_passes_nothing_through_is_trained_within_given():
    attention = CrossAttention()
    inputs = make_key_value_proj_rank1_edit_modules_(
        attention, key_proj_name="to_k", value_proj_name="to_v"
    )
    x, (text, superclass) = torch.randn(2, 5, 16), torch.randn(2, 2, TOKENS, WIDTH)
    with pytest.raises(ValueError, match=r"concept_indices.*found none; call eval\(\)"):
        attention(x, text)
    with inputs.given(concept_indices=torch.tensor([2, 3]), text_enc_with_superclass=superclass):
        attention(x, text).sum().backward()
    assert attention.to_v.concept_outputs.grad is not None
    attention.eval()
    assert attention(x, text).shape == (2, 5, FEATURES)
