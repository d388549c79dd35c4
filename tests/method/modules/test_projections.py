"""The edit modules: the usage researchers know, and the numbers of the method."""

from __future__ import annotations

import copy
import logging

import perfusion_pytorch
import pytest
import torch
from torch import nn

from perfusion import (
    ConceptInputs,
    Covariance,
    Rank1EditModule,
)
from perfusion.gated.gate import Gate
from perfusion.gated.rank_one import Direction, edit_projection
from tests.method.modules.small_modules import (
    FEATURES,
    TOKENS,
    WIDTH,
    covariance_matrix,
    projection,
    ready,
    train_once,
)


def test_the_usage_of_the_projects_front_page_runs():
    to_keys = nn.Linear(768, 320, bias=False)
    to_values = nn.Linear(768, 320, bias=False)
    wrapped_to_keys = Rank1EditModule(to_keys, is_key_proj=True)
    wrapped_to_values = Rank1EditModule(to_values)
    text_enc = torch.randn(4, 77, 768)
    text_enc_with_superclass = torch.randn(4, 77, 768)
    concept_indices = torch.randint(0, 77, (4,))
    for wrapped in (wrapped_to_keys, wrapped_to_values):
        projected = wrapped(
            text_enc,
            concept_indices=concept_indices,
            text_enc_with_superclass=text_enc_with_superclass,
        )
        assert projected.shape == (4, 77, 320)
    wrapped_to_keys.eval()
    wrapped_to_values.eval()
    keys, values = wrapped_to_keys(text_enc), wrapped_to_values(text_enc)
    assert keys.shape == values.shape == (4, 77, 320)
    assert float((keys - to_keys(text_enc)).abs().max()) > 0.01


def test_the_older_order_of_arguments_means_the_same_as_the_named_ones():
    text_enc, superclass = torch.randn(2, 4, 256, WIDTH)
    places = torch.randint(0, 256, (4,))
    linear = projection()
    older = Rank1EditModule(linear, C=covariance_matrix(), is_key_proj=True, num_finetune_prompts=9)
    named = Rank1EditModule(linear, C=covariance_matrix(), is_key_proj=True)
    expected = named(text_enc, concept_indices=places, text_enc_with_superclass=superclass)
    torch.testing.assert_close(older(text_enc, superclass, places), expected)
    with pytest.raises(TypeError, match=r"concept_indices=.*text_enc_with_superclass="):
        older(text_enc, superclass)


def test_a_matrix_that_is_no_covariance_runs_with_a_warning_as_in_the_first_front_page(caplog):
    """Its `input_covariance = torch.randn(512, 512)` is neither symmetric nor positive."""
    with caplog.at_level(logging.WARNING, "perfusion"):
        keys = Rank1EditModule(
            nn.Linear(512, 1024, bias=False),
            C=torch.randn(512, 512, generator=torch.Generator().manual_seed(1)),
            is_key_proj=True,
            num_finetune_prompts=32,
        )
    assert "expected a symmetric positive definite covariance" in caplog.text
    text_enc, superclass = torch.randn(2, 4, 256, 512)
    projected = keys(text_enc, superclass, torch.randint(0, 256, (4,)))
    assert projected.shape == (4, 256, 1024)
    assert bool(torch.isfinite(projected).all())


def test_settings_that_exist_no_more_name_what_replaced_them():
    for name, remedy in (("text_seq_len", "any length"), ("frac_gradient_concept_embed", "rate")):
        with pytest.raises(TypeError, match=rf"{name}.*{remedy}"):
            Rank1EditModule(projection(), **{name: 1})


@pytest.mark.parametrize("is_key", [False, True])
def test_inference_agrees_with_perfusion_pytorch(is_key):
    torch.manual_seed(3)
    matrix, linear = covariance_matrix(), projection()
    exact = Covariance(matrix.double(), 400, 400, "all", "test", ridge=0.0)
    ours = Rank1EditModule(linear, is_key_proj=is_key, C=exact, eval_beta=0.7)
    i, superclass, o = torch.randn(WIDTH), torch.randn(WIDTH), torch.randn(FEATURES)
    ours.inputs.set(0, i, superclass)
    if is_key:
        o = linear(superclass).detach()
    else:
        ours.set_outputs(0, o)
    theirs = perfusion_pytorch.Rank1EditModule(
        linear, C=matrix, text_seq_len=TOKENS, is_key_proj=is_key, eval_beta=0.7
    )
    theirs.initted.fill_(True)
    theirs.ema_concept_text_encs.copy_(i[None])
    theirs.concept_outputs.data.copy_(o[None])
    encodings = torch.randn(3, TOKENS, WIDTH)
    encodings[1, 4] = i
    with torch.no_grad():
        found, expected = ours.eval()(encodings), theirs.eval()(encodings)
        # It inverts C in fp32, where we solve in fp64.
        tolerance = torch.finfo(torch.float32).eps * float(torch.linalg.cond(matrix.double()))
        assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
        assert float((expected - linear(encodings)).abs().max()) > 0.5


def test_training_mode_uses_the_training_gate_and_equation_three():
    module = Rank1EditModule(projection(), C=covariance_matrix())
    batch = train_once(module)
    i, u = module.inputs.i[0], module.inputs.u[0]
    direction = Direction(i, u, Gate(0.75, 0.1))
    outputs = module.outputs((0,))
    expected = edit_projection(module.linear.weight, batch["text_enc"], [direction], outputs)
    torch.testing.assert_close(module(**batch), expected)


def test_values_and_text_get_gradients_and_locked_keys_and_the_network_get_none():
    shared = ConceptInputs(WIDTH, C=covariance_matrix())
    keys = Rank1EditModule(projection(), is_key_proj=True, inputs=shared)
    values = Rank1EditModule(projection(), inputs=shared)
    text_enc, superclass = torch.randn(2, 4, TOKENS, WIDTH)
    text_enc.requires_grad_()
    superclass.requires_grad_()
    arguments = (text_enc, superclass, torch.tensor([1, 2, 3, 4]))
    (keys(*arguments).square().sum() + values(*arguments).square().sum()).backward()
    assert [name for name, p in keys.named_parameters() if p.requires_grad] == []
    trainable = [name for name, p in values.named_parameters() if p.requires_grad]
    assert trainable == ["concept_outputs"]
    assert float(values.concept_outputs.grad.abs().max()) > 0
    assert float(text_enc.grad.abs().max()) > 0
    assert superclass.grad is None
    assert keys.linear.weight.grad is None
    assert values.linear.weight.grad is None


def test_training_starts_with_what_the_superclass_projects_to():
    keys = Rank1EditModule(projection(), is_key_proj=True, C=covariance_matrix())
    values = Rank1EditModule(projection(), C=covariance_matrix())
    for module in (keys, values):
        batch = train_once(module)
        rows = batch["text_enc_with_superclass"][torch.arange(4), batch["concept_indices"]]
        torch.testing.assert_close(module.outputs((0,))[0], module.linear(rows.mean(0)))


@pytest.mark.parametrize("length", [1, 5, 77, 154])
def test_sequences_of_any_length_are_projected_token_by_token(length):
    module = ready(Rank1EditModule(projection(), C=covariance_matrix()))
    text_enc = torch.randn(2, length, WIDTH)
    whole = module(text_enc)
    parts = torch.cat([module(text_enc[:, n : n + 1]) for n in range(length)], dim=1)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_a_projection_with_a_bias_keeps_it_outside_of_the_edit():
    linear = projection(bias=True)
    plain = projection()
    plain.weight = linear.weight
    with_bias, without = Rank1EditModule(linear), Rank1EditModule(plain)
    batch = train_once(with_bias)
    found, expected = with_bias(**batch), without(**batch)
    torch.testing.assert_close(with_bias.concept_outputs, without.concept_outputs)
    torch.testing.assert_close(found, expected + linear.bias)


def test_strength_zero_leaves_the_projection_as_it_was_and_the_gate_can_be_set():
    module = ready(Rank1EditModule(projection(), C=covariance_matrix()))
    text_enc = torch.randn(2, TOKENS, WIDTH)
    opened = module(text_enc)
    module.inputs.set_gate(bias=0.2)
    assert not torch.equal(module(text_enc), opened)
    module.inputs.set_gate(strength=0.0)
    torch.testing.assert_close(module(text_enc), module.linear(text_enc), rtol=0, atol=0)


def test_a_state_dict_restores_a_module_and_it_can_be_copied():
    module = ready(Rank1EditModule(projection(), C=covariance_matrix(), num_concepts=2))
    other = Rank1EditModule(projection(), num_concepts=2).eval()
    other.load_state_dict(module.state_dict())
    text_enc = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        expected = module(text_enc, concept_id=(0, 1))
        torch.testing.assert_close(other(text_enc, concept_id=(0, 1)), expected)
        torch.testing.assert_close(copy.deepcopy(module)(text_enc, concept_id=(0, 1)), expected)
