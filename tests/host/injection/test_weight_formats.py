"""Concepts on weights in the forms that people load: quantised, packed, replaced, in half.

What is drawn is compared with an ordinary fp32 UNet of the weights that the form stands for, whose
projections are the pure functions; so a form works exactly or is refused by name.
"""

from __future__ import annotations

import functools

import comfy.ldm.modules.attention as attention
import comfy.model_management
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import cross_attentions
from comfyui_perfusion.host.text.twin import untwined
from comfyui_perfusion.perfusion.gated.twin_lock import twin_projection

from tests.host.injection import weight_formats as formats

FAMILY = "sd1_light"
PROMPT = "a <a> on the beach"
FP32, FP16 = formats.agreement(torch.float32), formats.agreement(torch.float16)


@pytest.fixture(scope="module")
def state(worlds):
    """The weights of a small UNet in fp32."""
    model = worlds.base_model(FAMILY)
    worlds.randomise(model.diffusion_model, 0)
    return {key: value.clone() for key, value in model.diffusion_model.state_dict().items()}


@pytest.fixture(scope="module")
def concept(worlds):
    """A concept of SD1.x whose gate stands open."""
    return worlds.concept(FAMILY, 0, "<a>", bias=-1.0)


FORMS = {
    **{
        name: functools.partial(formats.quantised_by_comfyui, algorithm=name)
        for name in QUANT_ALGOS
        if QUANT_ALGOS[name].get("quantize_input", True)
    },
    "packed": formats.packed,
    "replaced": formats.replaced_maps,
}


def pure_twin(worlds, model, concept, text):
    """A UNet whose values are the pure function of a prompt (1, N, D) and its twin."""
    pure = worlds.pure(model, [])
    prompt, twin = (each[0].to(model.model.get_dtype_inference()) for each in untwined(text[0][0]))

    directions = [concept.twin_direction()]

    def values(weight, output, context):
        rows = [
            twin_projection(weight, prompt.float(), twin.float(), directions, output)
            if torch.equal(row, twin)
            else torch.nn.functional.linear(row.float(), weight)
            for row in context
        ]
        return torch.stack(rows).to(context)

    for layer in cross_attentions(pure.model):
        key = layer.to_k.weight.detach()
        layer.to_k.forward = functools.partial(torch.nn.functional.linear, weight=key)
        weight = layer.to_v.weight.detach().float()
        layer.to_v.forward = functools.partial(values, weight, concept.o_v[layer.name][None])
    return pure


def expected_of(worlds, plain, concept, clip, lock, lora=None):
    """What a UNet made of the pure function draws."""
    if lock == "local":
        pure = worlds.pure(plain, [concept], lora)
    else:
        pure = pure_twin(worlds, plain, concept, worlds.encode(clip, PROMPT))
    return worlds.sample(pure, clip, PROMPT, 1)


def assert_close(found, expected, tolerance):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("lock", ["twin", "local"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_drawn_is_that_of_the_pure_function(worlds, state, concept, form, lock):
    model, stored = FORMS[form](worlds, state)
    plain, stock = formats.plain(worlds, stored), worlds.clip("sd1")
    assert not torch.equal(stored[KEY], state[KEY]), "nothing was quantised"
    base = worlds.sample(model, stock, "a cat on the beach", 1)
    assert_close(base, worlds.sample(plain, stock, "a cat on the beach", 1), FP32)
    patched, clip = apply_concepts(model, stock, [concept], lock)
    found = worlds.sample(patched, clip, PROMPT, 1)
    assert_close(found, expected_of(worlds, plain, concept, clip, lock), FP32)
    assert not torch.allclose(found, base, atol=1e-2)
    # A prompt that names nothing, and the model without the concept, are as before.
    if lock == "twin":
        assert torch.equal(worlds.sample(patched, clip, "a cat on the beach", 1), base)
    assert torch.equal(worlds.sample(model, stock, "a cat on the beach", 1), base)
    with torch.inference_mode():
        comfy.model_management.unload_all_models()
    for layer in cross_attentions(model.model):
        assert "forward" not in vars(layer.to_k)
        assert "forward" not in vars(layer.to_v)


KEY = "middle_block.1.transformer_blocks.0.attn2.to_v.weight"


@pytest.mark.parametrize("lock", ["twin", "local"])
def test_in_half_precision_too(worlds, state, concept, lock):
    half = {key: value.half() for key, value in state.items()}
    model = formats.plain(worlds, half, torch.float16)
    stock = worlds.clip("sd1")
    patched, clip = apply_concepts(model, stock, [concept], lock)
    plain = formats.plain(worlds, {key: value.float() for key, value in half.items()})
    found = worlds.sample(patched, clip, PROMPT, 1)
    assert_close(found, expected_of(worlds, plain, concept, clip, lock), FP16)
    if lock == "twin":
        text = "a cat on the beach"
        assert torch.equal(
            worlds.sample(patched, clip, text, 1), worlds.sample(model, stock, text, 1)
        )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("form", ["fp32", "float8_e4m3fn", "packed"])
def test_twin_lock_holds_what_it_promises_beside_a_lora_on_the_projections(
    worlds, state, concept, form, when
):
    model, stored = STREAMED["fp32"](worlds, state)
    if form != "fp32":
        model, stored = FORMS[form](worlds, state)
    lora, stock = worlds.lora(model, 5), worlds.clip("sd1")
    with_lora = worlds.with_lora(model, lora)
    if when == "before":
        patched, clip = apply_concepts(with_lora, stock, [concept], "twin")
    else:
        patched, clip = apply_concepts(model, stock, [concept], "twin")
        patched = worlds.with_lora(patched, lora)
    text = "a cat on the beach"
    base = worlds.sample(with_lora, stock, text, 1)
    assert not torch.allclose(base, worlds.sample(model, stock, text, 1), atol=1e-3)
    assert torch.equal(worlds.sample(patched, clip, text, 1), base)
    found = worlds.sample(patched, clip, PROMPT, 1)
    assert not torch.allclose(found, base, atol=1e-2)
    # Quantised by ComfyUI, what a LoRA makes of them is quantised again.
    if form != "float8_e4m3fn":
        added = dict(stored)
        for key in added:
            part = f"diffusion_model.{key.removesuffix('.weight')}"
            if f"{part}.lora_up.weight" in lora:
                up, down = (lora[f"{part}.lora_{way}.weight"] for way in ("up", "down"))
                added[key] = stored[key] + up @ down
        plain = formats.plain(worlds, added)
        assert_close(found, expected_of(worlds, plain, concept, clip, "twin"), FP32)


@pytest.mark.parametrize("form", ["float8_e4m3fn"])
def test_where_inputs_are_quantised_too_a_prompt_that_names_nothing_is_left_alone(
    worlds, state, concept, form
):
    model, _ = formats.quantised_by_comfyui(worlds, state, form, full_precision=False)
    for module in model.model.diffusion_model.modules():
        if hasattr(module, "_full_precision_mm"):
            # ComfyUI's choice on a GPU that multiplies in fp8.
            module._full_precision_mm = False
    stock, text = worlds.clip("sd1"), "a cat on the beach"
    patched, clip = apply_concepts(model, stock, [concept], "twin")
    base = worlds.sample(model, stock, text, 1)
    assert torch.equal(worlds.sample(patched, clip, text, 1), base)
    found = worlds.sample(patched, clip, PROMPT, 1)
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, base, atol=1e-2)


STREAMED = {
    "fp32": lambda worlds, state: (formats.plain(worlds, state), state),
    "float8_e4m3fn": FORMS["float8_e4m3fn"],
    "packed": FORMS["packed"],
}


@pytest.mark.parametrize("lock", ["twin", "local"])
@pytest.mark.parametrize("form", STREAMED)
def test_weights_that_are_streamed_draw_what_loaded_ones_do(worlds, state, concept, form, lock):
    model, _ = STREAMED[form](worlds, state)
    stock, text = worlds.clip("sd1"), "a cat on the beach"
    patched, clip = apply_concepts(model, stock, [concept], lock)
    expected = worlds.sample(patched, clip, PROMPT, 1)
    base = worlds.sample(model, stock, text, 1)
    with torch.inference_mode():
        streamed = formats.partly_loaded(patched.clone())
    # A LoRA would be added on the way; here every weight is as it is stored.
    assert_close(worlds.sample(streamed, clip, PROMPT, 1), expected, FP32)
    if lock == "twin":
        assert torch.equal(worlds.sample(streamed, clip, text, 1), base)
    with torch.inference_mode():
        comfy.model_management.unload_all_models()


def test_a_compiled_model_of_quantised_weights_draws_the_same(worlds, monkeypatch):
    # ComfyUI's choice with --use-pytorch-cross-attention; its default asks psutil mid-graph.
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    torch._dynamo.reset()
    whole, stock = worlds.new_model("small"), worlds.clip("sd1")
    fitting = worlds.fitting_concept(whole, stock, 0, "<a>", bias=-1.0)
    state = whole.model.diffusion_model.state_dict()
    model, _ = FORMS["float8_e4m3fn"](worlds, state, family="small")
    patched, clip = apply_concepts(model, stock, [fitting], "twin")
    expected = worlds.sample(patched, clip, PROMPT, 1)
    compiled = patched.clone()
    # As TorchCompileModel, with the backend that only traces.
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model=compiled, backend="eager", options=options)
    assert_close(worlds.sample(compiled, clip, PROMPT, 1), expected, FP32)
    torch._dynamo.reset()
