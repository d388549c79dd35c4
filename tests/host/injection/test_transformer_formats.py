"""Transformers with a text cross-attention in the forms that people load, with concepts on them.

What a form's weights stand for is put into an ordinary fp32 model, where what is drawn and learned
is that of the pure function (`test_transformers`).
"""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfy import model_base, model_patcher
from comfy.quant_ops import QuantizedTensor
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import cross_attentions
from comfyui_perfusion.host.pictures.training_images import TrainingImages
from comfyui_perfusion.host.training.view import training_view
from comfyui_perfusion.perfusion import Direction
from comfyui_perfusion.perfusion.gated.gate import Gate
from comfyui_perfusion.perfusion.gated.twin_lock import TwinProjections, twin_gates, twin_inputs

from tests.host.cross_models import CPU, CROSS, build_cross
from tests.host.cross_oracle import Small
from tests.host.injection import weight_formats as formats
from tests.host.training_world import batch_of

FP8 = torch.float8_e4m3fn
TEXT, NAMELESS = "a photo of a <a> in the snow", "a small cat in a garden"
CLOSE = formats.agreement(torch.float32)


pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture(scope="module", params=CROSS)
def small(request, worlds):
    return Small(request.param, worlds)


def model_in(name, state, dtype=torch.float32, cast=None, **settings):
    """A small MODEL whose configuration has these dtypes and settings, with a state loaded."""
    row = CROSS[name]
    config = row.config(dict(row.unet))
    config.set_inference_dtype(dtype, cast)
    for key, value in settings.items():
        setattr(config, key, value)
    # As in a graph: what is made outside of inference mode cannot be moved inside of it.
    with torch.inference_mode():
        base: model_base.BaseModel = row.base(config, device=CPU)
        row.shrink(base.diffusion_model)
        base.diffusion_model.load_state_dict(state, strict=False)
        if dtype is torch.float16 and hasattr(base.diffusion_model, "llm_adapter"):
            base.diffusion_model.llm_adapter.to(dtype)
    return model_patcher.CoreModelPatcher(base, load_device=CPU, offload_device=CPU)


def state_of(small):
    return {
        k: v.clone() for k, v in build_cross(small.name).model.diffusion_model.state_dict().items()
    }


def stored_in_fp8(small):
    """All weights as fp8 numbers, cast where they are used; an adapter in the model stays."""
    state = {
        key: value if key.startswith("llm_adapter.") else value.to(FP8)
        for key, value in state_of(small).items()
    }
    meant = {key: value.float() for key, value in state.items()}
    model = model_in(small.name, state, FP8, torch.float32)
    assert cross_attentions(model.model)[0].modules[0].weight.dtype is FP8
    return model, model_in(small.name, meant)


def scaled_fp8(small):
    """The layers that read the text quantised by ComfyUI, each with a scale of its own."""
    part = cross_attentions(small.model.model)[0].name.rpartition(".")[2]
    state = state_of(small)
    layers = {key: value for key, value in state.items() if not key.startswith("llm_adapter.")}
    stored, meant = formats.quantised_state(layers, "float8_e4m3fn", f".{part}.")
    rest = {key: value for key, value in state.items() if key not in layers}
    settings = {"quant_config": {"mixed_ops": True}}
    model = model_in(small.name, stored | rest, cast=torch.float32, **settings)
    assert isinstance(cross_attentions(model.model)[0].modules[0].weight, QuantizedTensor)
    return model, model_in(small.name, meant | rest)


FORMS = {"fp8": stored_in_fp8, "fp8 scaled": scaled_fp8}


def drawn(small, worlds, model, text, applied=True, lock="twin"):
    """One step's latent of a prompt, with a concept applied."""
    clip = small.clip
    if applied:
        model, clip = apply_concepts(model, clip, small.concepts[:1], lock)
    return small.sample(model, worlds.encode(clip, text), worlds.encode(clip, ""), steps=1)


def assert_close(found, expected, close=CLOSE):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.float() / scale, expected / scale, rtol=0, atol=close)


@pytest.mark.parametrize("form", FORMS)
def test_a_concept_on_fp8_weights_is_that_on_what_they_stand_for(small, worlds, form):
    model, plain = FORMS[form](small)
    found = drawn(small, worlds, model, TEXT)
    assert_close(found, drawn(small, worlds, plain, TEXT))
    base = drawn(small, worlds, model, NAMELESS, applied=False)
    assert torch.equal(drawn(small, worlds, model, NAMELESS), base)
    assert not torch.allclose(found, drawn(small, worlds, model, TEXT, applied=False), atol=1e-3)


def learned(model, small):
    """Loss and gradients of a training step with the twin lock."""
    random = torch.Generator().manual_seed(0)
    channels, side = small.row.latent[1], small.row.latent[-1]
    latents = [torch.randn(1, channels, side, side, generator=random) for _ in range(2)]
    pictures = TrainingImages(latents, None, [(8 * side, 8 * side)] * 2, "0" * 16)
    with training_view(model, small.clip, pictures, "mug", "<thing>") as view:
        vectors = {
            name: torch.full_like(vector, 0.1) for name, vector in view.random_embeddings().items()
        }
        named, twin = view.encode_twins(["a photo of a <thing>"] * 2, vectors)
        i = named.encodings[named.mask].double().mean(0)
        gates = twin_gates(named.encodings, twin.encodings, [Direction(i, i, Gate(0.7, 0.2))])
        values = {
            name: torch.full((1, width), 0.5, requires_grad=True)
            for name, width in view.layers.items()
        }
        inputs = twin_inputs(twin.encodings, gates)
        edit = TwinProjections(twin.encodings, inputs, gates, values)
        loss = view.errors(batch_of(1, 0), twin, edit).mean()
        loss.backward()
    return loss.detach(), torch.cat([value.grad.flatten() for value in values.values()])


@pytest.mark.parametrize("form", FORMS)
def test_a_step_on_fp8_weights_learns_what_one_on_their_values_does(small, form):
    (loss, found), (expected_loss, expected) = (
        learned(model, small) for model in FORMS[form](small)
    )
    assert_close(loss, expected_loss)
    assert float(expected.abs().max()) > 0
    # Backward there are as many operations again.
    assert_close(found, expected, 2**0.5 * CLOSE)


def test_a_concept_in_fp16_is_that_in_fp32(small, worlds):
    halves = {key: value.half() for key, value in state_of(small).items()}
    model = model_in(small.name, halves, torch.float16)
    plain = model_in(small.name, {key: value.float() for key, value in halves.items()})
    assert_close(
        drawn(small, worlds, model, TEXT),
        drawn(small, worlds, plain, TEXT),
        formats.agreement(torch.float16),
    )
    base = drawn(small, worlds, model, NAMELESS, applied=False)
    assert torch.equal(drawn(small, worlds, model, NAMELESS), base)


@pytest.mark.parametrize("form", FORMS)
def test_streamed_weights_draw_what_loaded_ones_do(small, worlds, form):
    model, _ = FORMS[form](small)
    patched, clip = apply_concepts(model, small.clip, small.concepts[:1], "twin")
    prompts = [worlds.encode(clip, text) for text in (TEXT, "")]
    expected = small.sample(patched, *prompts, steps=1)
    with torch.inference_mode():
        streamed = formats.partly_loaded(patched.clone())
    assert_close(small.sample(streamed, *prompts, steps=1), expected)
    with torch.inference_mode():
        comfy.model_management.unload_all_models()


# Tracing takes longer than all the rest.
@pytest.mark.parametrize("name", ["anima", "ltxv"])
def test_a_compiled_model_of_fp8_weights_draws_the_same(worlds, name):
    torch._dynamo.reset()
    small = Small(name, worlds)
    model, _ = stored_in_fp8(small)
    patched, clip = apply_concepts(model, small.clip, small.concepts[:1], "twin")
    prompts = [worlds.encode(clip, text) for text in (TEXT, "")]
    expected = small.sample(patched, *prompts, steps=1)
    # As TorchCompileModel, with the backend that only traces.
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model=patched, backend="eager", options=options)
    assert_close(small.sample(patched, *prompts, steps=1), expected)
    torch._dynamo.reset()
