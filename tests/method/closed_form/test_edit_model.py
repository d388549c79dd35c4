"""Edits without ComfyUI: diffusers' UNet with random weights, and plain modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from perfusion.closed_form.edit_model import edit_model, edit_with, find_projections
from perfusion.closed_form.matching import match_in_order
from perfusion.closed_form.preserve import preserve
from perfusion.closed_form.solver import solve
from perfusion.closed_form.time import time_constraints
from perfusion.closed_form.transformers_text import prompt_encoder

WIDTH = 24


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8, bias=False)
        self.to_k, self.to_v = (nn.Linear(width, 8, bias=False) for _ in range(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(8), Attention(WIDTH)


@pytest.fixture(scope="module")
def unet():
    """diffusers' UNet2DConditionModel, small, with random weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def state(model):
    return copy.deepcopy(model.state_dict())


def test_diffusers_unet_is_edited_in_its_text_projections_and_nowhere_else(toy, unet):
    before = state(unet)
    edit = edit_model(unet, toy, "a cat", "a red cat")
    after = state(unet)
    assert all(torch.equal(before[key], after[key]) for key in before), "the model was changed"
    names = {f"{name}.weight" for name in edit.changes}
    assert names == {key for key in before if ".attn2.to_k." in key or ".attn2.to_v." in key}
    assert len(names) > 4
    solved = solve(time_constraints(toy, "a cat", "a red cat"), 0.1)
    with edit.applied():
        for key, weight in unet.state_dict().items():
            old = before[key]
            wanted = old + solved.factors(old).dense() if key in names else old
            torch.testing.assert_close(weight, wanted)
    assert all(torch.equal(before[key], value) for key, value in unet.state_dict().items())


def test_the_edited_unet_draws_the_source_as_it_drew_what_its_tokens_answer_to(toy, unet):
    def predict(encodings):
        torch.manual_seed(1)
        with torch.no_grad():
            text = encodings.float()[None]
            return unet(torch.randn(1, 4, 8, 8), 10, encoder_hidden_states=text).sample

    source, destination = toy(["a cat", "a red cat"])
    old = predict(source.encodings)
    wanted = predict(destination.encodings[match_in_order(source, destination)])
    with edit_model(unet, toy, "a cat", "a red cat", lamb=1e-6, with_augs=False).applied():
        found = predict(source.encodings)
    assert float((found - wanted).norm()) < 0.01 * float((old - wanted).norm())


def test_keys_may_be_left_alone_and_the_strength_is_linear(toy):
    model = Block()
    edit = edit_model(model, toy, "a cat", "a red cat", with_to_k=False, with_augs=False)
    assert set(edit.changes) == {"attn2.to_v"}
    before = model.attn2.to_v.weight.detach().clone()
    edit.apply(0.5)
    expected = before + 0.5 * edit.changes["attn2.to_v"].dense()
    torch.testing.assert_close(model.attn2.to_v.weight.detach(), expected)


def test_a_second_edit_builds_on_what_was_applied(toy):
    model = Block()
    edit_model(model, toy, "a cat", "a red cat").apply()
    between = model.attn2.to_k.weight.detach().clone()
    second = edit_model(model, toy, "a dog", "a blue dog")
    wanted = solve(time_constraints(toy, "a dog", "a blue dog"), 0.1).factors(between)
    torch.testing.assert_close(second.changes["attn2.to_k"].dense(), wanted.dense())


def test_a_model_without_text_projections_is_refused_instead_of_left_as_it_was(toy):
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention(WIDTH)

    with pytest.raises(
        ValueError, match=r"Renamed has no cross-attention.*nothing would be edited"
    ):
        edit_model(Renamed(), toy, "a cat", "a red cat")
    told = Renamed()
    told.attention.is_cross_attention = True  # type: ignore[assignment]
    assert set(find_projections(told, WIDTH)) == {"attention.to_k", "attention.to_v"}


def test_the_encoder_of_another_model_is_refused_with_both_widths(toy):
    with pytest.raises(ValueError, match=r"encodings 24 wide, the text encoder gives 23"):
        find_projections(Block(), WIDTH - 1)


def test_a_layer_that_is_not_finite_is_named(toy):
    model = Block()
    with torch.no_grad():
        model.attn2.to_v.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"attn2\.to_v: expected a projection of finite weights"):
        edit_model(model, toy, "a cat", "a red cat")


def test_the_report_says_what_was_done(toy):
    model = Block()
    constraints = time_constraints(toy, "a cat", "a red cat", augment=False)
    kept = preserve(toy(["a house"]), 1.0)
    free, held = (
        edit_with(model, constraints, 1e-3),
        edit_with(model, constraints, 1e-3, True, kept),
    )
    layer = free.report.layers[0]
    dense, weight = free.changes[layer.name].dense(), model.attn2.to_k.weight.detach()
    assert layer.change == pytest.approx(float(dense.norm() / weight.norm()), rel=1e-4)
    asked = weight @ (constraints.targets - constraints.inputs).float().mT
    left = asked - dense @ constraints.inputs.float().mT
    assert layer.residual == pytest.approx(float(left.norm() / asked.norm()), rel=1e-3)
    rows = kept.sample.float().mT
    held_layer = held.report.layers[0]
    drift = (held.changes[layer.name].dense() @ rows).norm() / (weight @ rows).norm()
    assert held_layer.drift == pytest.approx(float(drift), rel=1e-3)
    assert layer.drift is None
    assert free.report.constraints == (12, 10)
    text = held.report.text()
    for part in ("2 projections", "rank", "12, of which 10", "condition number", "drift"):
        assert part in text


class Tokenizer:
    """As a transformers tokenizer: called with texts, gives padded ids."""

    model_max_length = 12
    bos_token_id, eos_token_id = 1, 2

    def __init__(self, toy) -> None:
        self.toy = toy

    def __call__(self, texts, padding):
        assert padding == "max_length"
        return {"input_ids": [list(self.toy.prompt(text).tokens) for text in texts]}

    def convert_ids_to_tokens(self, row):
        names = {self.toy.token(piece): piece.replace(" ", "</w>") for piece in self.toy.ids}
        return [names.get(token, str(token)) for token in row]


class TextEncoder(nn.Module):
    """As a transformers text encoder: ids to a tuple that begins with the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, WIDTH)

    def forward(self, ids):
        return (self.table(ids).cumsum(1),)


def test_prompts_are_encoded_by_a_tokenizer_and_a_text_encoder(toy):
    tokenizer, encoder = Tokenizer(toy), TextEncoder()
    (found,) = prompt_encoder(tokenizer, encoder)(["a bird-bath"])
    assert found.tokens == toy.prompt("a bird-bath").tokens
    assert found.pieces[1:4] == ("a ", "bird", "bath ")
    assert (found.first, found.end) == (1, 4)
    assert torch.equal(found.encodings, encoder(torch.tensor([found.tokens]))[0][0].detach())
    assert prompt_encoder(tokenizer, encoder)([]) == []
    edit = edit_model(Block(), prompt_encoder(tokenizer, encoder), "a cat", "a red cat")
    assert edit.report.rank > 0


def test_a_prompt_too_long_for_the_tokenizer_is_refused(toy):
    tokenizer = Tokenizer(toy)
    tokenizer.model_max_length = 5
    with pytest.raises(ValueError, match="'a cat' is too long: expected at most 5 tokens"):
        prompt_encoder(tokenizer, TextEncoder())(["a cat"])
