"""What the edit modules compute, keep and share, and in which precision."""

from __future__ import annotations

import copy
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from perfusion import (
    ConceptInputs,
    Rank1EditModule,
    get_finetune_optimizer,
)
from tests.method.modules.small_modules import (
    FEATURES,
    TOKENS,
    WIDTH,
    batch_for,
    covariance_matrix,
    projection,
    ready,
)


def test_locked_keys_follow_the_weights_of_the_network_they_are_put_into():
    keys = ready(Rank1EditModule(projection(), is_key_proj=True, C=covariance_matrix()))
    keys.linear.weight.data.copy_(projection().weight)
    expected = keys.linear(keys.inputs.superclass_encoding)
    torch.testing.assert_close(keys.outputs((0,)), expected)


def test_half_precision_networks_keep_their_dtype_and_fp32_inputs():
    module = ready(Rank1EditModule(projection(), C=covariance_matrix()))
    text_enc = torch.randn(2, TOKENS, WIDTH)
    expected = module(text_enc)
    half = copy.deepcopy(module).to(torch.bfloat16)
    found = half(text_enc.bfloat16())
    assert found.dtype == torch.bfloat16
    assert half.inputs.u.dtype == half.inputs.i.dtype == torch.float32
    torch.testing.assert_close(half.inputs.u, module.inputs.u)
    difference = (found.float() - expected).detach().abs().max() / expected.detach().abs().max()
    # Roundings of a sum of WIDTH products, relative to the largest entry.
    assert float(difference) < WIDTH**0.5 * torch.finfo(torch.bfloat16).eps


def test_layers_that_share_inputs_compute_similarities_once_without_gradients(monkeypatch):
    calls, results = [], []
    original = ConceptInputs.gated.__globals__["gated_inputs"]

    def counted(*arguments):
        found = original(*arguments)
        calls.append(None)
        results.append(found[0])
        return found

    monkeypatch.setitem(ConceptInputs.gated.__globals__, "gated_inputs", counted)
    shared = ConceptInputs(WIDTH, C=covariance_matrix())
    layers = [ready(Rank1EditModule(projection(), inputs=shared)) for _ in range(6)]
    text_enc = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        first = [layer(text_enc) for layer in layers]
        assert len(calls) == 1
        text_enc[0, 0] += 1  # the very tensor, changed in place
        assert not torch.equal(layers[0](text_enc), first[0])
        shared.set_gate(bias=0.1)
        changed = layers[0](text_enc)
    assert len(calls) == 3
    torch.testing.assert_close(changed, layers[0](text_enc))
    kept = weakref.ref(results[2])
    del results[:], calls[:]
    assert kept() is not None
    del text_enc
    assert kept() is None


class Counting(TorchDispatchMode):
    """Counts what torch is asked to compute within this context."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations[func.name()] += 1
        return func(*args, **(kwargs or {}))


READS = ("aten::_local_scalar_dense", "aten::equal", "aten::item")


@pytest.mark.parametrize("is_key", [False, True])
def test_a_projection_at_inference_costs_its_own_forward_and_one_update_and_reads_nothing(is_key):
    shared = ConceptInputs(WIDTH, C=covariance_matrix())
    module = ready(Rank1EditModule(projection(), is_key_proj=is_key, inputs=shared))
    text_enc = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad(), Counting() as plain:
        module.linear(text_enc)
    with torch.no_grad():
        expected = module(text_enc)
        with Counting() as counted:
            found = module(text_enc)
    assert torch.equal(found, expected)
    assert not any(counted.operations[name] for name in READS)
    extra = counted.operations - plain.operations
    assert extra["aten::bmm"] + extra["aten::mm"] <= 1
    assert counted.operations.total() <= plain.operations.total() + 6


def test_locked_keys_are_kept_until_the_weights_or_the_superclass_change():
    keys = ready(Rank1EditModule(projection(), is_key_proj=True, C=covariance_matrix()))

    def expected() -> Tensor:
        return keys.linear(keys.inputs.superclass_encoding)

    first = keys.outputs((0,))
    assert keys.outputs((0,)) is first
    with torch.no_grad():
        keys.linear.weight += 1
    torch.testing.assert_close(keys.outputs((0,)), expected())
    keys.inputs.set(0, torch.randn(WIDTH), torch.randn(WIDTH))
    torch.testing.assert_close(keys.outputs((0,)), expected())
    keys.load_state_dict({k: v * 2 if "weight" in k else v for k, v in keys.state_dict().items()})
    torch.testing.assert_close(keys.outputs((0,)), expected())
    keys.linear.weight = nn.Parameter(torch.randn(FEATURES, WIDTH))
    torch.testing.assert_close(keys.outputs((0,)), expected())
    keys.linear.weight.data.mul_(3)  # unseen by torch's count of writes
    keys.inputs.forget()
    torch.testing.assert_close(keys.outputs((0,)), expected())
    handle = keys.linear.register_forward_hook(lambda module, given, found: 2 * found)
    torch.testing.assert_close(keys.outputs((0,)), expected())
    handle.remove()
    torch.testing.assert_close(keys.outputs((0,)), expected())
    keys.double()
    assert keys.outputs((0,)).dtype == torch.float64


def test_what_inference_mode_computed_is_not_used_where_gradients_flow():
    shared = ConceptInputs(WIDTH, C=covariance_matrix())
    keys = ready(Rank1EditModule(projection(), is_key_proj=True, inputs=shared))
    text_enc = torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    with torch.inference_mode():
        expected = keys(text_enc)
    found = keys(text_enc)
    found.sum().backward()
    torch.testing.assert_close(found.detach(), expected.clone())
    assert float(text_enc.grad.abs().max()) > 0


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_network_in_half_precision_is_trained_in_fp32_and_stays_finite(cast):
    module = Rank1EditModule(projection(), C=covariance_matrix())
    optimizer = get_finetune_optimizer(module)
    getattr(module, cast)()
    dtype = module.linear.weight.dtype
    assert dtype != torch.float32
    assert module.concept_outputs.dtype == torch.float32
    for seed in range(3):
        batch = batch_for(0, seed, dtype)
        loss = module(**batch).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert module.concept_outputs.grad.dtype == torch.float32
        before = module.concept_outputs.detach().clone()
        optimizer.step()
        assert bool(torch.isfinite(module.concept_outputs).all())
        assert not torch.equal(module.concept_outputs, before)
    getattr(module, cast)()
    assert module.concept_outputs.grad.dtype == torch.float32


def test_autocast_changes_no_gate_and_rounds_no_locked_key_of_a_module():
    module = ready(Rank1EditModule(projection(), is_key_proj=True, C=covariance_matrix()))
    text_enc = torch.randn(2, TOKENS, WIDTH)
    inputs, gates = module.inputs.gated(text_enc, (0,), training=False)
    expected = module.outputs((0,))
    module.inputs.forget()
    with torch.autocast("cpu", torch.bfloat16):
        for found, exact in zip(
            (*module.inputs.gated(text_enc, (0,), training=False), module.outputs((0,))),
            (inputs, gates, expected),
            strict=True,
        ):
            assert torch.equal(found, exact)
        assert module(text_enc).dtype == torch.bfloat16
