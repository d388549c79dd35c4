"""Training in every precision: right gradients, the user's model untouched, nothing kept twice."""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import pytest
import torch
from comfy import model_base
from comfyui_perfusion.host.models.families import cross_attentions
from comfyui_perfusion.host.training.private_copy import PRECISIONS
from comfyui_perfusion.perfusion import Covariance, TrainingConfig, train_concept

from tests.host.injection import weight_formats as formats
from tests.host.training_world import Kept, batch_of, edit_for, gradients, view_of

# Each pass is some two hundred operations in a row whose results are rounded, by at most half the
# dtype's step; such errors have no common sign, so they grow with the root of their number.
ROUNDINGS = 2 * 200
AGREEMENT = {
    name: ROUNDINGS**0.5 * torch.finfo(dtype).eps / 2 for name, dtype in PRECISIONS.items()
}


@pytest.fixture(scope="module")
def world(worlds):
    """A small SD1.x model with its text encoder and VAE, and two pictures."""
    images = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    return worlds.new_model("sd1_light"), worlds.clip("sd1"), worlds.vae(), images


@pytest.fixture(scope="module")
def exact(world):
    """Loss and gradients in fp32."""
    with view_of(world) as view:
        return gradients(view)


def stored_in(worlds, dtype, computing=None):
    """The world's model as a checkpoint in another dtype, cast to `computing` where it is used."""
    base = worlds.base_model("sd1_light")
    worlds.randomise(base.diffusion_model, 0)
    config = base.model_config
    config.set_inference_dtype(dtype, computing)
    config.custom_operations = comfy.ops.manual_cast
    stored = model_base.BaseModel(config, device=torch.device("cpu"))
    state = base.diffusion_model.state_dict()
    if dtype.itemsize == 1:
        # As published: what is small stays precise.
        state = {k: v.to(dtype if v.ndim > 1 else torch.float32) for k, v in state.items()}
        stored.diffusion_model.load_state_dict(state, assign=True)
    else:
        stored.diffusion_model.load_state_dict(state)
    return worlds.patcher(stored)


def distance(found, expected):
    """How far gradients are from others, relative to those."""
    flat = [torch.cat([g.flatten().float() for g in each.values()]) for each in (found, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def bits(patcher):
    """Copies of all weights that can be compared whatever their dtype."""
    state = patcher.model.state_dict()
    return {k: v.clone().contiguous().view(-1).view(torch.uint8) for k, v in state.items()}


def same_bits(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(v, second[k]) for k, v in first.items()
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_agrees_with_fp32(world, exact, precision):
    before = bits(world[0])
    with view_of(world, precision=precision) as view:
        assert view.encode(["a <thing>"], view.initial_embeddings()).encodings.dtype in (
            PRECISIONS[precision],
        )
        assert view.needs_scaling == (precision == "fp16")
        loss, found = gradients(view, scale=1024.0 if view.needs_scaling else 1.0)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert float(loss) == pytest.approx(float(exact[0]), rel=AGREEMENT[precision])
    assert distance(found, exact[1]) < AGREEMENT[precision]
    assert world[0].model.get_dtype_inference() is torch.float32
    assert same_bits(bits(world[0]), before)


def test_gradients_in_fp16_are_only_right_when_scaled(world, exact):
    with view_of(world, precision="fp16") as view:
        _, small = gradients(view, scale=1e-4)
        _, scaled = gradients(view, scale=1024.0)
    assert distance(scaled, exact[1]) < AGREEMENT["fp16"] < distance(small, exact[1])


def test_an_fp16_model_is_trained_in_a_dtype_whose_gradients_do_not_underflow(worlds, world):
    model = stored_in(worlds, torch.float16)
    before = bits(model)
    with view_of((model, *world[1:])) as view:
        assert not view.needs_scaling
        encoded = view.encode(["a <thing>"], view.initial_embeddings())
        assert encoded.encodings.dtype in (torch.bfloat16, torch.float32)
        _, found = gradients(view)
    assert all(float(gradient.norm()) > 0 for gradient in found.values())
    assert model.model.get_dtype_inference() is torch.float16
    assert same_bits(bits(model), before)


def test_a_model_stored_in_half_precision_keeps_no_weight_twice(worlds, world):
    kept = []
    for model in (stored_in(worlds, torch.float16, torch.float32), world[0]):
        with view_of((model, *world[1:])) as view:
            encoded = view.encode(["a <thing>"], view.initial_embeddings())
            edit = edit_for(view, encoded)
            with Kept(view._model) as measured:
                view.errors(batch_of(0), encoded, edit)
        kept.append(measured.size)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_stored_in_fp8_train_as_their_values_do(worlds, world, checkpointing):
    model = stored_in(worlds, torch.float8_e4m3fn, torch.float32)
    assert cross_attentions(model.model)[0].to_v.weight.dtype is torch.float8_e4m3fn
    before = bits(model)
    with view_of((model, *world[1:]), gradient_checkpointing=checkpointing) as view:
        assert next(view._model.diffusion_model.parameters()).dtype is torch.float8_e4m3fn
        loss, found = gradients(view)
    assert same_bits(bits(model), before)
    values = worlds.base_model("sd1_light")
    state = {k: v.float() for k, v in model.model.diffusion_model.state_dict().items()}
    values.diffusion_model.load_state_dict(state)
    with view_of((worlds.patcher(values), *world[1:])) as view:
        expected_loss, expected = gradients(view)
    torch.testing.assert_close(loss, expected_loss)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("when", ["bare", "lora", "loaded"])
def test_weights_that_a_pack_unpacks_train_as_their_values_do(worlds, world, when):
    values = worlds.base_model("sd1_light")
    worlds.randomise(values.diffusion_model, 0)
    models = {}
    model, stored = formats.packed(worlds, values.diffusion_model.state_dict())
    models["packed"], models["plain"] = model, formats.plain(worlds, stored)
    if when != "bare":
        lora = worlds.lora(models["plain"], 5)
        models = {name: worlds.with_lora(each, lora) for name, each in models.items()}
    drawn = {name: worlds.sample(each, world[1], "a mug", 1) for name, each in models.items()}
    if when != "loaded":
        comfy.model_management.unload_all_models()
    found = {}
    for name, each in models.items():
        with view_of((each, *world[1:])) as view:
            found[name] = gradients(view)
    torch.testing.assert_close(found["packed"][0], found["plain"][0])
    assert distance(found["packed"][1], found["plain"][1]) < AGREEMENT["fp32"]
    assert torch.equal(worlds.sample(models["packed"], world[1], "a mug", 1), drawn["packed"])


def test_packed_weights_are_part_of_what_a_run_can_be_continued_with(worlds, world):
    state = worlds.base_model("sd1_light").diffusion_model
    hashes = []
    for seed in (0, 0, 1):
        worlds.randomise(state, seed)
        model, _ = formats.packed(worlds, state.state_dict())
        with view_of((model, *world[1:])) as view:
            hashes.append(view.data_hash)
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fp8_weights_can_be_computed_with_in_half_precision(worlds, world, precision):
    model = stored_in(worlds, torch.float8_e4m3fn, torch.float32)
    with view_of((model, *world[1:])) as view:
        _, expected = gradients(view)
    with view_of((model, *world[1:]), precision=precision) as view:
        assert view.needs_scaling == (precision == "fp16")
        _, found = gradients(view, scale=1024.0 if view.needs_scaling else 1.0)
    assert distance(found, expected) < AGREEMENT[precision]
    assert model.model.get_dtype_inference() is torch.float32


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_few_steps_in_half_precision_end_near_those_in_fp32(world, precision):
    config = TrainingConfig(
        *("<thing>", "mug", 3, 2, 0.003, 0.001),
        templates=("a photo of a {}", "the {}"),
    )
    losses = []
    for each in ("fp32", precision):
        with view_of(world, superclass="mug", precision=each) as view:
            identity = torch.eye(768, dtype=torch.float64)
            covariance = Covariance(identity, 1, 1, "words", view.encoder_hash)
            result = train_concept(view, config, covariance)
        assert result.error is None
        assert result.steps == 3
        losses.append(result.losses)
    assert losses[1] == pytest.approx(losses[0], rel=AGREEMENT[precision])


def test_the_precision_is_part_of_what_a_run_can_be_continued_with(world):
    hashes = set()
    for precision in ("fp32", "bf16", "fp16"):
        with view_of(world, precision=precision) as view:
            hashes.add(view.data_hash)
    assert len(hashes) == 3
