"""Training with the twin lock on real models: what a step computes, and what it leaves alone."""

from __future__ import annotations

import contextlib

import comfy.model_management
import comfy.sample
import pytest
import torch
from comfyui_perfusion.demo.model.small_autoencoder import DOWNSCALE, LATENT_CHANNELS
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import cross_attentions
from comfyui_perfusion.host.models.native_loss import schedule
from comfyui_perfusion.host.text.placeholders import serve_vectors
from comfyui_perfusion.host.text.twin_vectors import served_rows, superclass_words, twin_vector
from comfyui_perfusion.perfusion import Direction, load_concept, save_concept
from comfyui_perfusion.perfusion.gated.gate import Gate
from comfyui_perfusion.perfusion.gated.twin_lock import (
    TwinProjections,
    twin_gates,
    twin_inputs,
    twin_projection,
)

from tests.host.small_training import STEPS, SmallTraining, Tripwire, use_folder
from tests.host.training_world import batch_of, view_of

TWIN = {"mode": "twin_lock"}
PROMPTS = ["a photo of a <thing>", "the <thing>, at night"]


@pytest.fixture(scope="module")
def world(worlds):
    """A small SD1.x model with its text encoder and VAE, and three pictures."""
    images = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    return worlds.new_model("small"), worlds.clip("sd1"), worlds.vae(), images


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        yield SmallTraining(patch)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    use_folder(monkeypatch, tmp_path)
    return tmp_path


def file_of(concept, folder):
    """The bytes of a concept's file."""
    return save_concept(concept, folder / "concept.safetensors", torch.float32).read_bytes()


@pytest.mark.parametrize("family", ["small", "sdxl"])
def test_prompts_and_their_twins_are_encoded_as_the_text_encode_node_does(worlds, world, family):
    model, clip = world[:2]
    if family == "sdxl":
        model, clip = worlds.model("sdxl"), worlds.clip("sdxl")
    with view_of((model, clip, *world[2:])) as view:
        vectors = view.random_embeddings()
        named, twin = view.encode_twins(PROMPTS, vectors)
    rows = served_rows(superclass_words(clip, "coffee mug"), vectors)
    served = serve_vectors(clip, "<thing>", rows)
    texts = [prompt.replace("<thing>", "coffee mug") for prompt in PROMPTS]
    near = {"rtol": 1e-4, "atol": 1e-4}
    for row in range(2):
        with torch.no_grad():
            expected = served.encode_from_tokens(served.tokenize(PROMPTS[row]))
            own, pooled = clip.encode_from_tokens(clip.tokenize(texts[row]), return_pooled=True)
        torch.testing.assert_close(named.encodings[row : row + 1], expected, **near)
        torch.testing.assert_close(twin.encodings[row : row + 1], own, **near)
        if family == "sdxl":
            torch.testing.assert_close(twin.extra[row : row + 1], pooled, **near)
    # Of "coffee mug" the concept's own token is the last.
    assert named.mask.nonzero().tolist() == [[0, 6], [1, 3]]
    assert torch.equal(named.mask, twin.mask)
    differ = (named.encodings != twin.encodings).any(dim=-1)
    assert [row.int().argmax().item() for row in differ] == [6, 3]


def test_the_loss_of_a_step_is_that_of_the_pure_function(world):
    model, _, vae, images = world
    with view_of(world) as view:
        named, twin = view.encode_twins(PROMPTS, view.random_embeddings())
        i = named.encodings[named.mask].double().mean(0)
        direction = Direction(i, i, Gate(0.7, 0.2))
        random = torch.Generator().manual_seed(2)
        values = {
            name: torch.randn(1, width, generator=random) for name, width in view.layers.items()
        }
        gates = twin_gates(named.encodings, twin.encodings, [direction])
        inputs = twin_inputs(twin.encodings, gates)
        edit = TwinProjections(twin.encodings, inputs, gates, values)
        batch = batch_of(2, 0)
        found = view.errors(batch, twin, edit).detach()
        plain = view.errors(batch, twin, None).detach()
    comfy.model_management.load_models_gpu([model])
    clean = model.model.process_latent_in(vae.encode(images))[[2, 0]]
    sampling = model.model.model_sampling
    sigma = schedule(sampling, batch.timesteps)
    noisy = sampling.noise_scaling(sigma, batch.noise(*clean.shape[1:]), clean)

    def edited(name):
        def hook(module, _, __):
            return twin_projection(
                module.weight, named.encodings, twin.encodings, [direction], values[name]
            )

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in cross_attentions(model.model):
            stack.callback(layer.to_v.register_forward_hook(edited(layer.name)).remove)
        denoised = model.model.apply_model(noisy, sigma, c_crossattn=twin.encodings)
    expected = (denoised - clean).square() / sigma[:, None, None, None] ** 2
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_gradients_reach_every_value_output_and_nothing_else(world):
    with torch.inference_mode(), view_of(world) as view:
        named, twin = view.encode_twins(PROMPTS, view.random_embeddings())
        view.release_text()
        i = named.encodings[named.mask].double().mean(0)
        gates = twin_gates(named.encodings, twin.encodings, [Direction(i, i, Gate(0.7, 0.2))])
        values = {
            name: torch.zeros(1, width, requires_grad=True) for name, width in view.layers.items()
        }
        inputs = twin_inputs(twin.encodings, gates)
        edit = TwinProjections(twin.encodings, inputs, gates, values)
        view.errors(batch_of(0, 1), twin, edit).mean().backward()
        models = view.patcher.model, view.clip.cond_stage_model
        assert all(weight.grad is None for each in models for weight in each.parameters())
    for value in values.values():
        assert float(value.grad.abs().max()) > 0


def test_the_text_encoder_is_not_called_in_any_step(small, folder, monkeypatch):
    places = []
    tripwire = Tripwire(monkeypatch, lambda place: places.append((tripwire.steps, place)))
    try:
        trained = small.run(TWIN, sample_every=0)
    finally:
        tripwire.remove()
    assert tripwire.steps == STEPS
    assert trained.concept.key_lock == "twin"
    first = next(at for at, (_, place) in enumerate(places) if place == "model")
    assert "text" in [place for _, place in places[:first]]
    assert "text" not in [place for _, place in places[first:]]
    assert small.is_untouched()


def test_the_text_encoders_are_out_of_memory_while_it_learns(small, folder, monkeypatch):
    loaded = []

    def look(place):
        if place == "model":
            current = comfy.model_management.current_loaded_models
            loaded.append([type(each.model.model).__name__ for each in current])

    tripwire = Tripwire(monkeypatch, look)
    try:
        small.run(TWIN, sample_every=2)
    finally:
        tripwire.remove()
    text = type(small.clip.cond_stage_model).__name__
    assert loaded
    assert all(text not in names for names in loaded)


def test_samples_do_not_change_what_is_learned_and_the_same_run_gives_the_same_file(small, folder):
    plain = small.run(TWIN, sample_every=0, checkpoint_every=0)
    watched = small.run(TWIN, sample_every=1, checkpoint_every=1, resume="never")
    assert file_of(plain.concept, folder) == file_of(watched.concept, folder)
    assert watched.samples.shape[2] > plain.samples.shape[2]


def test_a_model_that_carries_concepts_with_another_lock_is_trained_with(
    small, folder, monkeypatch
):
    plain = small.run(TWIN)
    other = small.run(sample_every=0).concept
    with torch.inference_mode():
        carrying, _ = apply_concepts(small.model, small.clip, [other], "local")
    with monkeypatch.context() as patch:
        patch.setattr(small, "model", carrying)
        found = small.run(TWIN, resume="never")
    assert torch.equal(found.samples, plain.samples)
    assert file_of(found.concept, folder) == file_of(plain.concept, folder)


def test_samples_are_what_a_user_will_draw_with_twin_lock(small, folder):
    trained = small.run(TWIN, sample_every=STEPS)
    side = trained.samples.shape[1]
    with torch.inference_mode():
        model, clip = apply_concepts(small.model, small.clip, [trained.concept], "twin")
        texts = ("a <bo> on the beach", "")
        conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts]
        empty = torch.zeros(1, LATENT_CHANNELS, side // DOWNSCALE, side // DOWNSCALE)
        noise = comfy.sample.prepare_noise(empty, 0)
        latent = comfy.sample.sample(
            *(model, noise, 1, 5.0, "euler", "normal", *conds, empty), disable_pbar=True, seed=0
        )
        expected = (small.vae.decode(latent)[0] * 255).round() / 255
    assert torch.equal(trained.samples[0, :, -side:], expected)
    assert not torch.equal(trained.samples[0, :, :side], expected)


def test_a_twin_training_that_is_cut_off_goes_on_to_the_same_file(small, folder, monkeypatch):
    whole = small.run(TWIN, sample_every=0)
    interrupt = comfy.model_management.InterruptProcessingException

    def at(place):
        if place == "model" and tripwire.steps == 2:
            raise interrupt

    tripwire = Tripwire(monkeypatch, at)
    try:
        with pytest.raises(interrupt):
            small.run(TWIN, sample_every=0, resume="never")
    finally:
        tripwire.remove()
    longer = small.run(TWIN, sample_every=0)
    assert "continued from step 2" in longer.report
    assert file_of(longer.concept, folder) == file_of(whole.concept, folder)


def test_a_concept_file_says_of_which_seed_its_vector_is(small, folder):
    trained = small.run(TWIN, sample_every=0).concept
    kept = load_concept(save_concept(trained, folder / "concept.safetensors", torch.float32))
    words = superclass_words(small.clip, kept.superclass)
    for name, vector in kept.embeddings.items():
        drawn = twin_vector(kept.placeholder, name, words[name].rows[-1])
        assert torch.equal(vector, drawn)
        other = twin_vector("<bo-2>", name, words[name].rows[-1])
        assert abs(float(torch.cosine_similarity(vector, other, dim=0))) < 0.5


def test_the_published_locks_start_at_the_vector_of_that_seed(small, folder):
    with view_of((small.model, small.clip, small.vae, small.images)) as view:
        start = view.random_embeddings()
        words = superclass_words(small.clip, "coffee mug")
        for name, vector in start.items():
            assert torch.equal(vector, twin_vector("<thing>", name, words[name].rows[-1]))


def test_the_node_trains_with_the_lock_that_is_chosen(small, folder):
    twin = small.run_node(key_lock=["twin"]).args[0]
    local = small.run_node(key_lock=["local"]).args[0]
    assert (twin.key_lock, local.key_lock) == ("twin", "local")
    assert not torch.equal(twin.i, local.i)
