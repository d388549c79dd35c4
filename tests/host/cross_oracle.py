"""What a transformer with concepts should draw, by the pure function and nothing of the host's."""

from __future__ import annotations

import copy
import dataclasses
import functools

import comfy.model_management
import comfy.sample
import torch
from comfyui_perfusion.host.models.families import (
    cross_attentions,
    family_of,
)
from comfyui_perfusion.host.models.networks import FusedPart
from comfyui_perfusion.host.text.marked_words import takes_place_of
from comfyui_perfusion.host.text.twin import untwined
from comfyui_perfusion.perfusion.gated.twin_lock import twin_gates, twin_inputs
from torch.nn import functional

from tests.host.cross_models import (
    CROSS,
    build_cross,
)

PROMPT = "a photo of a <a>, and a (<b>:1.3) in the snow"
READS_AS = "a photo of a mug, and a (blue bag:1.3) in the snow"
NAMELESS = "a small cat in a garden"
# Sums of some thousand products in fp32, relative to the largest value.
CLOSE = {"rtol": 0, "atol": 2e-4}


class Small:
    """A family's small MODEL and CLIP, and two concepts with open gates."""

    def __init__(self, name, worlds):
        self.name = name
        self.row = CROSS[name]
        self.model = build_cross(name)
        self.clip = self.row.clip()
        first = self.concept(worlds, 0, "<a>", "mug")
        second = self.concept(worlds, 1, "<b>", "blue bag", strength=0.7)
        self.concepts = first, dataclasses.replace(second, twin_locked=True)

    def concept(self, worlds, seed, placeholder, superclass, **changes):
        changes = {"bias": -1.0, **changes}
        found = worlds.fitting_concept(self.model, self.clip, seed, placeholder, **changes)
        return dataclasses.replace(found, superclass=superclass)

    def sample(self, model, positive, negative, steps=2):
        with torch.inference_mode():
            latent = torch.zeros(self.row.latent)
            noise = comfy.sample.prepare_noise(latent, 0)
            return comfy.sample.sample(
                *(model, noise, steps, 2.0, "euler", "simple", positive, negative, latent),
                disable_pbar=True,
                seed=0,
            )


def rows_of(layer):
    """The weights and biases of a layer's keys and values."""
    found = []
    for part in (layer.to_k, layer.to_v):
        module = part.module if isinstance(part, FusedPart) else part
        rows = slice(part.start, part.stop) if isinstance(part, FusedPart) else slice(None)
        bias = None if module.bias is None else module.bias[rows]
        found.append((module.weight[rows], bias))
    return found


def replace_projections(model, keys, values):
    """Let a model of its own project by functions of (layer's name, weight, bias, what is read)."""
    for layer in cross_attentions(model.model):
        (k, k_bias), (v, v_bias) = rows_of(layer)
        key = functools.partial(keys, layer.name, k, k_bias)
        value = functools.partial(values, layer.name, v, v_bias)
        if len(layer.modules) == 1:
            layer.modules[0].forward = lambda x, key=key, value=value: torch.cat(
                [key(x), value(x)], -1
            )
        else:
            layer.to_k.forward, layer.to_v.forward = key, value
    return model


def plain(name, weight, bias, context):
    return functional.linear(context, weight, bias)


def close_to(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, **CLOSE)


def oracle(small, concepts, pairs, pure=None, acting=lambda layer, concept: True):
    """A model that reads twins, its values the pure function of a table of (e, t), (1, N, D)."""
    pure = pure or build_cross(small.name)
    entry = family_of(pure.model).network.entry
    network = pure.model.diffusion_model

    def read_of(encodings):
        if hasattr(network, "text_embedding_padding"):
            return read_by_hunyuan_dit(network, encodings)
        return encodings if entry is None else network.get_submodule(entry)(encodings)

    def pair_of(row):
        for prompt, twin in pairs:
            read = read_of(twin)[0]
            if read.shape == row.shape and torch.allclose(read, row, atol=1e-5):
                return prompt, twin
        raise AssertionError("the model reads something else than a twin")

    def values(name, weight, bias, context):
        chosen = [concept for concept in concepts if acting(name, concept)]
        if not chosen:
            return functional.linear(context, weight, bias)
        outputs = torch.stack([concept.o_v[name] for concept in chosen])
        found = []
        for row in context:
            prompt, twin = pair_of(row)
            directions = [each.twin_direction(family_of(pure.model).parts) for each in chosen]
            gates = twin_gates(prompt, twin, directions)[0]
            found.append(functional.linear(twin_inputs(row, gates), weight, bias) + gates @ outputs)
        return torch.stack(found)

    return replace_projections(pure, plain, values)


def read_by_hunyuan_dit(network, encodings):
    """What its layers read of BERT's tokens and mT5's behind them, zero where they are no words."""
    width = network.text_states_dim
    count = max(77, 1 + int((encodings[0, :, :width] != 0).any(-1).nonzero().max()))
    bert, mt5 = encodings[:, :count, :width], encodings[:, count:, width:]
    read = torch.cat([bert, network.mlp_t5(mt5)], 1)
    words = (encodings != 0).any(-1, keepdim=True)
    padding = torch.zeros_like(read)
    padding[:, count - 77 : count] = network.text_embedding_padding[:77]
    padding[:, -256:] = network.text_embedding_padding[77:]
    return torch.where(words, read, padding)


def both_encodings(cond, more):
    """A prompt and its twin of two text encoders as one row of tokens, zero where not words."""
    masks = [more[name][0, :, None] for name in ("attention_mask", "attention_mask_mt5xl")]
    found = []
    for bert, mt5 in zip(untwined(cond), untwined(more["conditioning_mt5xl"]), strict=True):
        rows = [torch.block_diag(bert[0] * masks[0], mt5[0] * masks[1])]
        found.append(torch.stack(rows))
    return tuple(found)


def read_pairs(small, clip, texts):
    """(e, t) of prompts, as the model is called with them."""
    pairs = []
    for text in texts:
        for cond, more in encoded(clip, text):
            if "conditioning_mt5xl" in more:
                pairs.append(both_encodings(cond, more))
                continue
            pair = untwined(cond)
            adapts = family_of(small.model.model).network.adapts
            pairs.append(adapted(small, clip.tokenize(text), pair, more) if adapts else pair)
    return pairs


def adapted(small, tokens, pair, more):
    """A prompt and its twin through a copy of Anima's adapter whose table has a row for each."""
    adapter = copy.deepcopy(small.model.model.diffusion_model.llm_adapter)
    table = adapter.embed.weight
    rows, ids = [], [more["t5xxl_ids"].clone(), more["t5xxl_ids"].clone()]
    for at, (token, _) in enumerate(tokens["t5xxl"][0]):
        if isinstance(token, torch.Tensor):
            instead = token, table[list(takes_place_of(token))].mean(0)
            for own, row in zip(ids, instead, strict=True):
                own[at] = len(table) + len(rows)
                rows.append(row)
    adapter.embed.weight = torch.nn.Parameter(torch.cat([table, *(row[None] for row in rows)]))
    with torch.no_grad():
        found = [adapter(e, own[None]) for e, own in zip(pair, ids, strict=True)]
    found = [each * more["t5xxl_weights"][None, :, None] for each in found]
    return tuple(functional.pad(each, (0, 0, 0, 512 - each.shape[1])) for each in found)


def encoded(clip, text):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))
