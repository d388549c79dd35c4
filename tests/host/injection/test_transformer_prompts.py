"""Prompts and schedules on transformers: stock nodes, long prompts, moments and blocks."""

from __future__ import annotations

import pytest
import torch
from comfyui_perfusion.host.injection.agenda import clock_of
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.blocks import block_names
from comfyui_perfusion.host.models.families import cross_attentions
from comfyui_perfusion.host.text.twin import TwinEncoding, untwined
from comfyui_perfusion.perfusion import GateSchedule

import nodes
from tests.host.cross_oracle import PROMPT, READS_AS, close_to, oracle, read_pairs

# Longer than BERT, mT5 and LTX-Video's T5 are filled up to.
LONG = "a photo of a <a> on a table" + ", and an old house in a garden beside it" * 28


pytestmark = pytest.mark.usefixtures("narrow")


def test_the_stock_node_encodes_prompts_that_name_concepts(small):
    _, clip = apply_concepts(small.model, small.clip, small.concepts, "twin")
    with torch.inference_mode():
        ((found, more),) = nodes.CLIPTextEncode().encode(clip, PROMPT)[0]
        ((expected, plain),) = nodes.CLIPTextEncode().encode(small.clip, READS_AS)[0]
    prompt, twin = untwined(found)
    assert isinstance(found, TwinEncoding)
    assert torch.equal(twin, expected)
    assert not torch.equal(prompt, twin)
    for name, value in plain.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(untwined(more[name])[1], value)


@pytest.mark.parametrize("named", ["positive", "negative"])
def test_prompt_and_negative_may_be_of_other_lengths(small, worlds, named):
    """A long prompt beside an empty one, whichever of the two names a concept."""
    patched, clip = apply_concepts(small.model, small.clip, small.concepts[:1], "twin")
    texts = (LONG, "") if named == "positive" else ("a cat", LONG)
    stock = [text.replace("<a>", "mug") for text in texts]
    found = small.sample(patched, *(worlds.encode(clip, text) for text in texts))
    pairs = read_pairs(small, clip, texts)
    plain = [worlds.encode(small.clip, text) for text in stock]
    close_to(found, small.sample(oracle(small, small.concepts[:1], pairs), *plain))
    assert not torch.equal(found, small.sample(small.model, *plain))


def test_a_concept_may_act_in_some_blocks_only(small, worlds):
    first = small.concepts[0]
    blocks = block_names([layer.name for layer in cross_attentions(small.model.model)])
    within = GateSchedule(0.0, 1.0, (-1.0, -1.0), (0.2, 0.2), (blocks[-1],))
    patched, clip = apply_concepts(small.model, small.clip, [first.with_schedule(within)], "twin")
    named = [worlds.encode(clip, text) for text in (PROMPT.replace("<b>", "bag"), "")]
    stock = [
        worlds.encode(small.clip, text)
        for text in ("a photo of a mug, and a (bag:1.3) in the snow", "")
    ]
    pairs = read_pairs(small, clip, (PROMPT.replace("<b>", "bag"), ""))

    def acting(layer, concept):
        return layer.startswith(f"{blocks[-1]}.")

    pure = oracle(small, [first.with_gate(bias=-1.0, temperature=0.2)], pairs, acting=acting)
    close_to(small.sample(patched, *named), small.sample(pure, *stock))


def test_a_gate_moves_with_the_steps(small, worlds):
    first = small.concepts[0]
    moving = GateSchedule(0.0, 1.0, (-1.0, 1.5), (0.2, 0.5), ())
    patched, clip = apply_concepts(small.model, small.clip, [first.with_schedule(moving)], "twin")
    text = PROMPT.replace("<b>", "bag")
    named = [worlds.encode(clip, each) for each in (text, "")]
    stock = [worlds.encode(small.clip, text.replace("<a>", "mug")), worlds.encode(small.clip, "")]
    pairs = read_pairs(small, clip, (text, ""))
    clock = clock_of(small.model.get_model_object("model_sampling"))
    now = [first]
    pure = oracle(small, now, pairs)
    calls = pure.model._apply_model

    def at_a_moment(x, t, *args, **kwargs):
        bias, temperature = moving.gate(clock.progress(float(t.flatten()[0])))
        now[0] = first.with_gate(bias=bias, temperature=temperature)
        return calls(x, t, *args, **kwargs)

    pure.model._apply_model = at_a_moment
    found = small.sample(patched, *named)
    close_to(found, small.sample(pure, *stock))
    still, _ = apply_concepts(small.model, small.clip, [first], "twin")
    assert not torch.equal(found, small.sample(still, *named))
