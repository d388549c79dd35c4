"""The trainer's view of a real MODEL, CLIP and VAE, and that nothing of theirs is changed."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfy import model_base
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import UnsupportedModelError, cross_attentions
from comfyui_perfusion.host.models.native_loss import schedule
from comfyui_perfusion.host.pictures.training_images import ImageOptions, encode_images
from comfyui_perfusion.host.text.placeholders import PlaceholderError, serve_vectors
from comfyui_perfusion.host.training.view import training_view
from comfyui_perfusion.perfusion import gated_inputs
from comfyui_perfusion.perfusion.gated.rank_one import GatedProjections
from comfyui_perfusion.perfusion.training.denoiser import Batch

from tests.host.training_world import WORDS, batch_of, edit_for, view_of

TYPES = {
    "noise": model_base.ModelType.EPS,
    "v": model_base.ModelType.V_PREDICTION,
    "flow": model_base.ModelType.FLOW,
}


@pytest.fixture(scope="module")
def world(worlds):
    """A small SD1.x model with its text encoder and VAE, and three pictures."""
    images = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    return worlds.new_model("small"), worlds.clip("sd1"), worlds.vae(), images


def test_prompts_are_encoded_as_the_text_encode_node_does(world):
    vector = torch.randn(768, generator=torch.Generator().manual_seed(1)) * 0.5
    served = serve_vectors(world[1], "<thing>", {"l": vector})
    prompts = ["a photo of a <thing>", "the <thing>, at night"]
    expected = torch.cat([served.encode_from_tokens(served.tokenize(p)) for p in prompts])
    with view_of(world) as view:
        encoded = view.encode(prompts, {"l": vector})
    torch.testing.assert_close(encoded.encodings, expected, rtol=1e-5, atol=1e-5)
    assert encoded.mask.nonzero().tolist() == [[0, 5], [1, 2]]


def test_the_superclass_is_marked_and_its_sub_words_averaged(world):
    with view_of(world, superclass="birdbath") as view:
        encoded = view.encode_superclass(["a birdbath", "my nice birdbath"])
        vectors = view.initial_embeddings()
    bird, bath = (t for t, _ in world[1].tokenize("birdbath")["l"][0][1:3])
    table = world[1].cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    assert torch.equal(vectors["l"], table[[bird, bath]].mean(0))
    assert encoded.mask.nonzero().tolist() == [[0, 2], [0, 3], [1, 3], [1, 4]]


@pytest.mark.parametrize("kind", TYPES)
def test_the_error_is_that_of_the_models_own_prediction(worlds, world, kind):
    model = worlds.new_model("small", model_type=TYPES[kind])
    with view_of((model, *world[1:])) as view:
        encoded = view.encode(["a <thing>", "the <thing>"], view.initial_embeddings())
        batch = batch_of(2, 0)
        found = view.errors(batch, encoded, None).detach()
    sampling, unet = model.model.model_sampling, model.model.diffusion_model
    clean = model.model.process_latent_in(world[2].encode(world[3]))[[2, 0]]
    noise = batch.noise(*clean.shape[1:])
    sigma = schedule(sampling, batch.timesteps)
    wide = sigma[:, None, None, None]
    if kind == "flow":
        noisy, target = (1 - wide) * clean + wide * noise, noise - clean
    else:
        alpha = 1 / (1 + wide**2).sqrt()
        noisy = alpha * clean + alpha * wide * noise
        target = noise if kind == "noise" else alpha * noise - alpha * wide * clean
    with torch.no_grad():
        predicted = unet(noisy, sampling.timestep(sigma).float(), encoded.encodings)
    torch.testing.assert_close(found, (predicted - target).square(), rtol=2e-3, atol=2e-3)


def test_a_model_of_another_prediction_type_is_refused_by_name(worlds, world):
    model = worlds.new_model("small", model_type=model_base.ModelType.IMG_TO_IMG)
    with (
        pytest.raises(UnsupportedModelError, match=r"IMG_TO_IMG.*expected noise, v or flow"),
        view_of((model, *world[1:])),
    ):
        pass


def test_sdxl_is_told_the_pooled_text_and_the_size_of_the_pictures(worlds, world):
    model, clip = worlds.model("sdxl"), worlds.clip("sdxl")
    seen = {}
    images = torch.rand(2, 40, 64, 3)
    with view_of((model, clip, world[2], images)) as view:
        encoded = view.encode(["a <thing>", "the <thing>"], view.initial_embeddings())
        unet = view._model.diffusion_model
        original = unet.forward

        def forward(*args, **kwargs):
            seen.update(kwargs)
            return original(*args, **kwargs)

        unet.forward = forward
        view.errors(batch_of(0, 1), encoded, None)
    embedder = model.model.embedder
    sizes = [embedder(torch.tensor([float(x)])) for x in (40, 64, 0, 0, 40, 64)]
    expected = torch.cat([encoded.extra, torch.cat(sizes).flatten().repeat(2, 1)], dim=1)
    assert encoded.extra.shape == (2, 1280)
    assert torch.equal(seen["y"], expected)


def test_the_edit_under_training_is_the_edit_that_is_applied_later(worlds, world):
    model, clip, vae, images = world
    concept = worlds.fitting_concept(model, clip, 0, "<thing>")
    with view_of(world) as view:
        encoded = view.encode(["a <thing>"], concept.embeddings)
        inputs, gates = gated_inputs(encoded.encodings, [concept.direction()])
        keys = {
            name: view.project(name, "k", concept.superclass_encoding[None, None])[0]
            for name in view.layers
        }
        values = {name: output[None] for name, output in concept.o_v.items()}
        batch = batch_of(1)
        trained = view.errors(batch, encoded, GatedProjections(inputs, gates, keys, values))
        plain = view.errors(batch_of(1), encoded, None)
    patched, _ = apply_concepts(model, clip, [concept])
    comfy.model_management.load_models_gpu([patched])
    clean = model.model.process_latent_in(vae.encode(images))[[1]]
    sampling = model.model.model_sampling
    sigma = schedule(sampling, batch.timesteps)
    noise = batch.noise(*clean.shape[1:])
    noisy = sampling.noise_scaling(sigma, noise, clean)
    with torch.no_grad():
        denoised = patched.model.apply_model(noisy, sigma, c_crossattn=encoded.encodings)
    applied = (denoised - clean).square() / sigma**2
    torch.testing.assert_close(trained.detach(), applied, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(plain, applied, atol=1e-2)


def test_gradients_reach_the_token_vector_and_every_value_output(world):
    with torch.inference_mode(), view_of(world) as view:
        vector = view.initial_embeddings()["l"].requires_grad_(True)
        noise = torch.Generator().manual_seed(4)
        step = torch.randn(768, generator=noise)

        def loss(moved):
            encoded = view.encode(["a <thing>", "the <thing>"], {"l": moved})
            edit = edit_for(view, encoded)
            return view.errors(batch_of(0, 1), encoded, edit).mean(), edit

        value, edit = loss(vector)
        value.backward()
        assert all(float(output.grad.norm()) > 0 for output in edit.values.values())
        slope = float(vector.grad @ step)
        with torch.no_grad():
            size = 1e-2
            ahead, behind = loss(vector + size * step)[0], loss(vector - size * step)[0]
        assert slope == pytest.approx(float(ahead - behind) / (2 * size), rel=0.05, abs=1e-3)


def test_models_loaded_inside_a_prompt_can_be_trained_on(worlds, world):
    with torch.inference_mode():
        model = worlds.new_model("small", seed=3)
        clip = worlds.new_clip("sd1")
        vae = worlds.vae()
        with view_of((model, clip, vae, torch.rand(1, 32, 32, 3))) as view:
            assert not torch.is_inference_mode_enabled()
            vector = view.initial_embeddings()["l"].requires_grad_(True)
            encoded = view.encode(["a <thing>"], {"l": vector})
            view.errors(batch_of(0), encoded, None).mean().backward()
        assert torch.is_inference_mode_enabled()
    assert float(vector.grad.norm()) > 0


def loaded_models():
    return {id(each.model.model) for each in comfy.model_management.current_loaded_models}


class Stop(BaseException):
    """As ComfyUI's interrupt, no Exception."""


@pytest.mark.parametrize("failure", [None, ValueError, Stop])
def test_everything_is_as_before_whatever_happens(worlds, world, failure):
    model, clip, vae, _ = world
    patchers = model, clip.patcher, vae.patcher
    before = [worlds.state(patcher) for patcher in patchers]
    loaded_before = loaded_models()

    def use():
        with view_of(world) as view:
            assert comfy.model_management.in_training
            encoded = view.encode(["a <thing>"], view.initial_embeddings())
            view.errors(batch_of(0), encoded, edit_for(view, encoded)).mean().backward()
            if failure is not None:
                raise failure

    if failure is None:
        use()
    else:
        with pytest.raises(failure):
            use()
    assert not comfy.model_management.in_training
    after = [worlds.state(patcher) for patcher in patchers]
    assert all(worlds.same(a, b) for a, b in zip(before, after, strict=True))
    for layer in cross_attentions(model.model):
        assert "forward" not in vars(layer.to_k)
    own = {id(patcher.model) for patcher in patchers}
    assert loaded_models() - loaded_before <= own


def test_a_lora_on_the_model_counts(worlds, world):
    model = world[0]
    lora = worlds.lora(model, 7)
    encodings = torch.randn(1, 5, 768)
    layer = cross_attentions(model.model)[1]
    key = f"diffusion_model.{layer.name}.to_v"
    merged = layer.to_v.weight + lora[f"{key}.lora_up.weight"] @ lora[f"{key}.lora_down.weight"]
    with view_of((worlds.with_lora(model, lora), *world[1:])) as view:
        found = view.project(layer.name, "v", encodings)
    torch.testing.assert_close(found, encodings @ merged.mT, rtol=1e-3, atol=1e-3)


def test_concepts_applied_to_the_model_are_left_out_of_training(worlds, world):
    model, clip, *rest = world
    patched, clip_patched = apply_concepts(
        model, clip, [worlds.fitting_concept(model, clip, 0, "<other>")]
    )
    encodings = torch.randn(1, 5, 768)
    with view_of((patched, clip_patched, *rest)) as view:
        name = next(iter(view.layers))
        found = view.project(name, "v", encodings)
    assert torch.allclose(found, cross_attentions(model.model)[0].to_v(encodings), atol=1e-5)


def test_masks_are_those_of_the_images_of_the_batch(world):
    mask = torch.zeros(3, 32, 32)
    mask[0, :8, :8] = mask[1, 24:, 24:] = mask[2] = 1
    with view_of(world, mask=mask) as view:
        found = view.masks(batch_of(1, 0))
    expected = torch.zeros(2, 1, 4, 4)
    expected[0, 0, 3, 3] = expected[1, 0, 0, 0] = 1
    assert torch.equal(found, expected)


def test_pictures_of_two_sizes_in_two_versions_are_told_apart(world):
    model, clip, vae, images = world
    wide = torch.rand(1, 32, 64, 3, generator=torch.Generator().manual_seed(7))
    masks = [torch.rand(3, 32, 32), torch.rand(1, 32, 64)]
    pictures = encode_images(vae, [images, wide], masks, ImageOptions(flip=True))
    with training_view(model, clip, pictures, **WORDS) as view:
        assert (view.image_count, view.variant_count) == (4, 2)
        assert [view.shape(at) for at in range(4)] == [(4, 4), (4, 4), (4, 4), (4, 8)]
        encoded = view.encode(["a <thing>", "the <thing>"], view.initial_embeddings())
        both = Batch(
            torch.tensor([3, 3]),
            torch.tensor([0, 1]),
            torch.tensor([0.5, 0.5]),
            torch.zeros(2).long(),
        )
        errors, weights = view.errors(both, encoded, None), view.masks(both)
    assert errors.shape == (2, 4, 4, 8)
    torch.testing.assert_close(weights[0], weights[1].flip(-1))
    # With one seed both rows get the same noise, so only the picture differs.
    clean = model.model.process_latent_in(torch.cat([pictures.latents[3]]))
    assert not torch.allclose(clean[0], clean[1])
    assert not torch.allclose(errors[0], errors[1])


def test_without_a_mask_there_is_none(world):
    with view_of(world) as view:
        assert view.masks(batch_of(0)) is None
        assert view.image_count == 3


def test_a_placeholder_that_is_a_word_is_refused(world):
    with (
        pytest.raises(PlaceholderError, match="'cat' is a word the model already knows"),
        view_of(world, placeholder="cat"),
    ):
        pass


def test_a_placeholder_inside_the_superclass_is_refused(world):
    with (
        pytest.raises(PlaceholderError, match="part of the superclass"),
        view_of(world, superclass="a <thing> of clay"),
    ):
        pass


def test_a_prompt_without_its_word_is_refused_by_name(world):
    with view_of(world) as view:
        with pytest.raises(ValueError, match=r"'<thing>' is missing from the prompt 'a cat'"):
            view.encode(["a cat"], view.initial_embeddings())
        with pytest.raises(ValueError, match="'coffee mug' is missing from the prompt 'a mug'"):
            view.encode_superclass(["a mug"])
