"""Agreement with an independent implementation, perfusion-pytorch, where that one is right."""

from __future__ import annotations

import perfusion_pytorch
import pytest
import torch
from torch import nn

from perfusion.gated.gate import Gate
from perfusion.gated.rank_one import Direction, edit_projection

WIDTH, FEATURES, TOKENS = 48, 20, 11


@pytest.mark.parametrize("is_key", [False, True])
@pytest.mark.parametrize(("bias", "temperature"), [(0.7, 0.15), (0.4, 0.1)])
def test_the_single_concept_forward_in_eval_mode_agrees_in_fp32(is_key, bias, temperature):
    torch.manual_seed(3)
    samples = torch.randn(400, WIDTH) * torch.logspace(-0.5, 0.5, WIDTH)
    covariance = samples.mT @ samples / 400
    linear = nn.Linear(WIDTH, FEATURES, bias=False)
    module = perfusion_pytorch.Rank1EditModule(
        linear,
        C=covariance,
        text_seq_len=TOKENS,
        is_key_proj=is_key,
        eval_beta=bias,
        eval_temperature=temperature,
    ).eval()
    i, o = samples[0], torch.randn(FEATURES)
    # Training it would go through its faults; its buffers are set to a trained state directly.
    module.initted.fill_(True)
    module.ema_concept_text_encs.copy_(i[None])
    module.concept_outputs.data.copy_(o[None])
    encodings = torch.randn(3, TOKENS, WIDTH)
    encodings[1, 4] = i
    encodings[2, 2] = 0.7 * i + 0.3 * encodings[2, 2]
    dual = torch.linalg.solve(covariance.double(), i.double())
    direction = Direction(i, dual, Gate(bias, temperature))
    with torch.no_grad():
        found = edit_projection(linear.weight, encodings, [direction], o[None])
        expected = module(encodings)
        plain = linear(encodings)
    # It inverts C in fp32, where we solve in fp64.
    tolerance = torch.finfo(torch.float32).eps * float(torch.linalg.cond(covariance.double()))
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
    # The comparison means something: the edit moves these projections by far more than that.
    assert float((expected - plain).abs().max()) > 0.5
