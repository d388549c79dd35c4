"""The edit modules: the usage researchers know, the numbers of the method, and bad input."""

from __future__ import annotations

import copy
import logging
import weakref
from collections import Counter

import perfusion_pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from perfusion import (
    ConceptInputs,
    Covariance,
    Rank1EditModule,
    get_finetune_optimizer,
    make_key_value_proj_rank1_edit_modules_,
    merge_rank1_edit_modules,
)
from perfusion.gated.gate import Gate
from perfusion.gated.rank_one import Direction, edit_projection

WIDTH, FEATURES, TOKENS = 48, 20, 11


def covariance_matrix(seed: int = 3) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    samples = torch.randn(400, WIDTH, generator=random) * torch.logspace(-0.5, 0.5, WIDTH)
    return samples.mT @ samples / 400


def projection(bias: bool = False, features: int = FEATURES) -> nn.Linear:
    return nn.Linear(WIDTH, features, bias=bias)


def ready(module: Rank1EditModule, seed: int = 5) -> Rank1EditModule:
    """A module whose concepts hold known vectors, in eval mode."""
    random = torch.Generator().manual_seed(seed)
    for concept in range(module.num_concepts):
        i, superclass = torch.randn(2, WIDTH, generator=random)
        module.inputs.set(concept, i, superclass)
        if not module.is_key_proj:
            module.set_outputs(concept, torch.randn(FEATURES, generator=random))
    return module.eval()


def train_once(module: Rank1EditModule, seed: int = 1) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    batch = {
        "text_enc": torch.randn(4, TOKENS, WIDTH, generator=random).requires_grad_(),
        "concept_indices": torch.randint(0, TOKENS, (4,), generator=random),
        "text_enc_with_superclass": torch.randn(4, TOKENS, WIDTH, generator=random),
    }
    module(**batch)
    return batch


def batch_for(concept: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """A training batch of one concept."""
    random = torch.Generator().manual_seed(seed)
    return {
        "text_enc": torch.randn(4, TOKENS, WIDTH, generator=random).to(dtype),
        "concept_indices": torch.randint(0, TOKENS, (4,), generator=random),
        "text_enc_with_superclass": torch.randn(4, TOKENS, WIDTH, generator=random).to(dtype),
        "concept_id": concept,
    }


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


def test_locked_keys_follow_the_weights_of_the_network_they_are_put_into():
    keys = ready(Rank1EditModule(projection(), is_key_proj=True, C=covariance_matrix()))
    keys.linear.weight.data.copy_(projection().weight)
    expected = keys.linear(keys.inputs.superclass_encoding)
    torch.testing.assert_close(keys.outputs((0,)), expected)


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


def test_strength_zero_leaves_the_projection_as_it_was_and_the_gate_can_be_set():
    module = ready(Rank1EditModule(projection(), C=covariance_matrix()))
    text_enc = torch.randn(2, TOKENS, WIDTH)
    opened = module(text_enc)
    module.inputs.set_gate(bias=0.2)
    assert not torch.equal(module(text_enc), opened)
    module.inputs.set_gate(strength=0.0)
    torch.testing.assert_close(module(text_enc), module.linear(text_enc), rtol=0, atol=0)


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


def test_a_state_dict_restores_a_module_and_it_can_be_copied():
    module = ready(Rank1EditModule(projection(), C=covariance_matrix(), num_concepts=2))
    other = Rank1EditModule(projection(), num_concepts=2).eval()
    other.load_state_dict(module.state_dict())
    text_enc = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        expected = module(text_enc, concept_id=(0, 1))
        torch.testing.assert_close(other(text_enc, concept_id=(0, 1)), expected)
        torch.testing.assert_close(copy.deepcopy(module)(text_enc, concept_id=(0, 1)), expected)


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


def test_a_matrix_without_an_inverse_is_refused_in_a_sentence():
    singular = torch.eye(WIDTH)
    singular[0, 1], singular[0, 0] = 1.0, 0.0
    with pytest.raises(ValueError, match=r"C: expected a covariance.*has no inverse"):
        Rank1EditModule(projection(), C=singular)
