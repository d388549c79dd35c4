"""Concepts beside everything else people put on a model: families x situations.

In every cell the same is asked: the sampled latents are those of a separate UNet made of the pure
function, the clone without concepts is as before, and unloading leaves the weights bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.hooks
import comfy.ldm.modules.attention as attention
import comfy.model_management
import comfy.ops
import pytest
import torch
from comfy import model_base
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import cross_attentions
from comfyui_perfusion.host.text.twin import untwined
from comfyui_perfusion.perfusion import edit_projection

import nodes as comfy_nodes
from tests.host.twin_oracle import oracle

FAMILIES = ("sd1", "sd2", "sdxl")
PROMPT = "a <a> and <b>, on the (beach:1.2)"
CLOSE = {"rtol": 5e-4, "atol": 5e-4}


@dataclass
class Cell:
    """What one situation does; `worlds` and `family` come first in every call."""

    before: Callable = lambda worlds, family, model: model
    after: Callable = lambda worlds, family, model: model
    pure: Callable = lambda worlds, family, model: model
    conds: Callable = lambda worlds, family, positive, negative: (positive, negative)
    new_model: Callable | None = None
    lora: bool = False
    sampling: dict = field(default_factory=dict)


def lora_of(worlds, model):
    return worlds.lora(model, 5)


def add_lora(worlds, family, model):
    return worlds.with_lora(model, lora_of(worlds, model))


def image_prompt(worlds, family, model):
    """Owns attn2 the way IP-Adapter packs do: the text's result plus that of image tokens."""
    clone = model.clone()
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randn(1, 4, 64, generator=generator)

    def replace(q, k, v, extra_options):
        heads = extra_options["n_heads"]
        own = torch.Generator().manual_seed(k.shape[-1])
        image = tokens @ torch.randn(64, k.shape[-1], generator=own) * 0.1
        image = image.repeat(q.shape[0], 1, 1)
        text = attention.optimized_attention(q, k, v, heads)
        return text + 0.7 * attention.optimized_attention(q, image, image, heads)

    for place in ("input", "middle", "output"):
        for block in range(12):
            clone.set_model_attn2_replace(replace, place, block)
    return clone


def with_controlnet(worlds, family, positive, negative):
    control = worlds.controlnet(f"{family}_light", 4)
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    apply = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet
    both = apply(positive, negative, control, hint, 0.9, 0.0, 1.0)
    # ControlNets read the everyday word; the pure model has to be told so.
    return tuple(
        [[c, {**d, "cross_attn_controlnet": untwined(c)[1]}] for c, d in each] for each in both
    )


def in_regions(worlds, family, positive, negative):
    left = torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], dim=2)
    set_mask = comfy_nodes.ConditioningSetMask().append
    set_area = comfy_nodes.ConditioningSetArea().append
    return (
        set_mask(positive, left, "default", 0.8)[0]
        + set_mask(negative, 1 - left, "default", 1.0)[0]
        + set_area(positive, 32, 32, 16, 16, 0.7)[0],
        negative,
    )


def with_hooks(worlds, family, positive, negative):
    """A LoRA that only the positive prompt has, and only in the second half of the sampling."""
    model = worlds.model(f"{family}_light")
    hooks = comfy.hooks.create_hook_lora(lora_of(worlds, model), 1.0, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.3))
    keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.4))
    hooks.set_keyframes_on_hooks(keyframes)
    return comfy.hooks.set_conds_props([positive], 1.0, "default", hooks=hooks)[0], negative


def in_long_prompt(worlds, family, positive, negative):
    return comfy_nodes.ConditioningConcat().concat(positive, positive)[0], negative


def halved_context(worlds, family, model):
    clone = model.clone()
    clone.set_model_attn2_patch(lambda n, context, value, extra: (n, context * 0.5, value))
    return clone


def compiled(worlds, family, model):
    clone = model.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model=clone, backend="eager", options=options)
    return clone


def partly_loaded(worlds, family, model):
    """Loaded with room for a part of the weights; LoRA is then added while computing."""
    clone = add_lora(worlds, family, model)
    comfy.model_management.unload_all_models()
    size = clone.model_size()
    clone.model_patches_to(clone.load_device)
    loaded = comfy.model_management.LoadedModel(clone)
    loaded.real_model = None
    loaded.model_load(lowvram_model_memory=size // 3)
    comfy.model_management.current_loaded_models.insert(0, loaded)
    assert clone.model.model_lowvram
    return clone


def in_fp8(worlds, family):
    """As a checkpoint in fp8: weights stored so, cast to fp32 where they are used."""
    base = worlds.base_model(f"{family}_light")
    worlds.randomise(base.diffusion_model, 0)
    config = base.model_config
    config.set_inference_dtype(torch.float8_e4m3fn, torch.float32)
    config.custom_operations = comfy.ops.manual_cast
    kind = model_base.SDXL if family == "sdxl" else model_base.BaseModel
    stored = kind(config, model_type=base.model_type, device=torch.device("cpu"))
    state = {
        key: value.to(torch.float8_e4m3fn) if value.ndim > 1 else value
        for key, value in base.diffusion_model.state_dict().items()
    }
    stored.diffusion_model.load_state_dict(state)
    return worlds.patcher(stored)


CELLS = {
    "alone": Cell(),
    "lora before": Cell(before=add_lora, lora=True),
    "lora after": Cell(after=add_lora, lora=True),
    "attn2 owner before": Cell(before=image_prompt, pure=image_prompt),
    "attn2 owner after": Cell(after=image_prompt, pure=image_prompt),
    "attn2 patch": Cell(after=halved_context, pure=halved_context),
    "controlnet": Cell(conds=with_controlnet),
    "regional conditioning": Cell(conds=in_regions),
    "conditioning hooks": Cell(conds=with_hooks, sampling={"steps": 3}),
    "long prompt": Cell(conds=in_long_prompt),
    "compiled after": Cell(after=compiled),
    "compiled before": Cell(before=compiled),
    "fp8": Cell(new_model=in_fp8),
    "low vram": Cell(after=partly_loaded, lora=True),
    "batch of 3": Cell(sampling={"batch": 3}),
    "cfg 1": Cell(sampling={"cfg": 1.0}),
}


def assert_close(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, **CLOSE)


@pytest.fixture(autouse=True)
def _traceable(monkeypatch):
    """ComfyUI's choice with --use-pytorch-cross-attention; its default asks psutil mid-graph."""
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CELLS)
def test_concepts_and(worlds, name, family):
    cell = CELLS[name]
    kind = f"{family}_light"
    model = worlds.model(kind) if cell.new_model is None else cell.new_model(worlds, family)
    concepts = [worlds.concept(kind, 0, "<a>"), worlds.concept(kind, 1, "<b>", strength=0.7)]
    sampling = {"steps": 1, **cell.sampling}
    comfy.model_management.unload_all_models()
    stored = worlds.state(model)
    # Copied while nothing is loaded, when the weights are the model's own.
    lora = lora_of(worlds, model) if cell.lora else None
    pure = worlds.pure(model, concepts, lora)
    if name == "conditioning hooks":
        pure = reading_its_weights_anew(pure, concepts)
    pure = cell.pure(worlds, family, pure)

    base, clip = cell.before(worlds, family, model), worlds.clip(family)
    patched, clip = apply_concepts(base, clip, concepts)
    positive, negative = (worlds.encode(clip, text) for text in (PROMPT, "a cat"))
    conds = cell.conds(worlds, family, positive, negative)

    untouched = worlds.sample_conds(base, *conds, **sampling)
    found = worlds.sample_conds(cell.after(worlds, family, patched), *conds, **sampling)
    assert_close(found, worlds.sample_conds(pure, *conds, **sampling))
    assert not torch.allclose(found, untouched, atol=1e-3)

    assert torch.equal(worlds.sample_conds(base, *conds, **sampling), untouched)
    comfy.model_management.unload_all_models()
    assert same_bits(worlds.state(model), stored)
    for layer in cross_attentions(model.model):
        assert "forward" not in vars(layer.to_k)
        assert "forward" not in vars(layer.to_v)


# Compiling and an attn2_patch, which puts other encodings in the place of those that the table of
# twins holds, are in test_twin_lock_in_the_host.
ELSEWHERE = {"attn2 patch", "compiled after", "compiled before"}


@pytest.mark.parametrize("name", sorted(CELLS.keys() - ELSEWHERE))
def test_twin_locked_concepts_and(worlds, name):
    cell, family, kind = CELLS[name], "sd1", "sd1_light"
    model = worlds.model(kind) if cell.new_model is None else cell.new_model(worlds, family)
    concepts = [worlds.concept(kind, 0, "<a>"), worlds.concept(kind, 1, "<b>", strength=0.7)]
    sampling = {"steps": 1, **cell.sampling}
    comfy.model_management.unload_all_models()
    stored = worlds.state(model)
    lora = lora_of(worlds, model) if cell.lora else None

    base, stock = cell.before(worlds, family, model), worlds.clip(family)
    patched, clip = apply_concepts(base, stock, concepts, "twin")
    conds = cell.conds(worlds, family, worlds.encode(clip, PROMPT), worlds.encode(clip, "a cat"))
    pairs = [untwined(c) for each in conds for c, _ in each]
    pure = cell.pure(worlds, family, oracle(worlds, model, concepts, pairs, lora=lora))

    untouched = worlds.sample_conds(base, *conds, **sampling)
    after = cell.after(worlds, family, patched)
    found = worlds.sample_conds(after, *conds, **sampling)
    assert_close(found, worlds.sample_conds(pure, *conds, **sampling))
    assert not torch.allclose(found, untouched, atol=1e-3)

    # A prompt that names no concept is drawn to the last bit as without any.
    plain = [worlds.encode(stock, text) for text in ("a cat", "a mug")]
    bare = cell.after(worlds, family, base)
    expected = worlds.sample_conds(bare, *cell.conds(worlds, family, *plain), **sampling)
    after = cell.after(worlds, family, patched)
    assert torch.equal(
        worlds.sample_conds(after, *cell.conds(worlds, family, *plain), **sampling), expected
    )
    comfy.model_management.unload_all_models()
    assert same_bits(worlds.state(model), stored)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_clones_with_different_concepts_in_turns(worlds, family):
    kind = f"{family}_light"
    model, stock = worlds.model(kind), worlds.clip(family)
    concepts = [worlds.concept(kind, 0, "<a>"), worlds.concept(kind, 1, "<b>")]
    expected = []
    for concept in concepts:
        _, clip = apply_concepts(model, stock, [concept])
        expected.append(worlds.sample(worlds.pure(model, [concept]), clip, PROMPT, 1))
    clones = [apply_concepts(model, stock, [concept]) for concept in concepts]
    for _ in range(2):
        for (patched, clip), wanted in zip(clones, expected, strict=True):
            assert_close(worlds.sample(patched, clip, PROMPT, 1), wanted)
    assert not torch.allclose(*expected, atol=1e-3)


def reading_its_weights_anew(pure, concepts):
    """The pure function with the weights as they are when it is called, for hooks change them."""
    for layer in cross_attentions(pure.model):
        for part, module in (("to_k", layer.to_k), ("to_v", layer.to_v)):
            module.forward = _Live(module, part, layer.name, concepts)
    return pure


class _Live:
    def __init__(self, module, part, name, concepts):
        self.module, self.part, self.name, self.concepts = module, part, name, concepts

    def __call__(self, encodings):
        weight = self.module.weight
        outputs = [
            weight @ c.superclass_encoding if self.part == "to_k" else c.o_v[self.name]
            for c in self.concepts
        ]
        directions = [concept.direction() for concept in self.concepts]
        return edit_projection(weight, encodings, directions, torch.stack(outputs))


def same_bits(first, second):
    """Bitwise, also for dtypes that cannot be compared."""
    return first.keys() == second.keys() and all(
        torch.equal(
            value.contiguous().view(torch.uint8), second[key].contiguous().view(torch.uint8)
        )
        if value.ndim
        else value.item() == second[key].item()
        for key, value in first.items()
    )
