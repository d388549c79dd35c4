"""Training on transformers with a text cross-attention: a step is that of the pure function."""

from __future__ import annotations

import contextlib
import functools

import comfy.model_management
import pytest
import torch
from comfyui_perfusion.host.models.families import cross_attentions, family_of
from comfyui_perfusion.host.models.native_loss import schedule
from comfyui_perfusion.host.pictures.training_images import TrainingImages
from comfyui_perfusion.host.text.covariance import measure_covariance
from comfyui_perfusion.host.training.view import training_view
from comfyui_perfusion.perfusion import Direction, load_concept, save_concept, train_concept
from comfyui_perfusion.perfusion.gated.gate import Gate
from comfyui_perfusion.perfusion.gated.twin_lock import TwinProjections, twin_gates, twin_inputs
from comfyui_perfusion.perfusion.training.config import TrainingConfig

from tests.host.cross_models import CROSS, build_cross, narrow_families
from tests.host.cross_oracle import rows_of
from tests.host.training_world import batch_of

PROMPTS = ["a photo of a <thing>", "an old <thing>, in the snow"]
CAPTIONS = ["a blue bag", "a mug on a table", "an old house in a garden", "the small cat and a dog"]


@pytest.fixture(scope="module", autouse=True)
def _narrow():
    with narrow_families():
        yield


@pytest.fixture(scope="module")
def worlds_of():
    """A family's small MODEL, CLIP and latents of two pictures."""

    @functools.cache
    def make(name):
        generator = torch.Generator().manual_seed(0)
        channels = CROSS[name].latent[1]
        side = CROSS[name].latent[-1]
        latents = [torch.randn(1, channels, side, side, generator=generator) for _ in range(2)]
        pictures = TrainingImages(latents, None, [(8 * side, 8 * side)] * 2, "0" * 16)
        return build_cross(name), CROSS[name].clip(), pictures

    return make


@pytest.fixture(params=CROSS)
def world(request, worlds_of):
    return request.param, *worlds_of(request.param)


def view_of(world):
    _, model, clip, pictures = world
    return training_view(model, clip, pictures, "mug", "<thing>")


def unfilled(encodings):
    """How many tokens there are before the zeros that a prompt is filled up with."""
    return int((encodings != 0).any(-1).sum(1).max())


def hunyuan_dit_is_given(encodings, known):
    """BERT's 77 tokens and mT5's 256 behind them, apart, with their masks (2 more for mT5's)."""
    width = CROSS["hunyuan_dit"].widths[0]
    side = 8 * CROSS["hunyuan_dit"].latent[-1]
    more = {
        "encoder_hidden_states_t5": encodings[:, 77:, width:].contiguous(),
        "text_embedding_mask": known[:, :77],
        "text_embedding_mask_t5": known[:, 77:] - 2,
        "image_meta_size": torch.tensor([[side, side, side, side, 0, 0]] * len(known)).float(),
    }
    return encodings[:, :77, :width].clone(), more


def test_the_loss_of_a_step_is_that_of_the_pure_function(world):
    name, model, _, pictures = world
    with view_of(world) as view:
        named, twin = view.encode_twins(PROMPTS[:1] * 2, view.random_embeddings())
        i = named.encodings[named.mask].double().mean(0)
        direction = Direction(i, i, Gate(0.7, 0.2))
        random = torch.Generator().manual_seed(2)
        values = {
            layer: torch.randn(1, width, generator=random) for layer, width in view.layers.items()
        }
        gates = twin_gates(named.encodings, twin.encodings, [direction])
        inputs = twin_inputs(twin.encodings, gates)
        edit = TwinProjections(twin.encodings, inputs, gates, values)
        batch = batch_of(1, 0)
        found = view.errors(batch, twin, edit).detach()
        plain = view.errors(batch, twin, None).detach()
    comfy.model_management.load_models_gpu([model])
    base, frames = model.model, family_of(model.model).network.axes == 5
    clean = torch.cat([pictures.latents[at] for at in (1, 0)])
    clean = base.process_latent_in(clean[:, :, None] if frames else clean)
    sampling = base.model_sampling
    sigma = schedule(sampling, batch.timesteps)
    noise = batch.noise(*clean.shape[1:])
    noisy = sampling.noise_scaling(sigma.reshape(-1, *[1] * (clean.ndim - 1)), noise, clean)

    def edited(layer):
        (_, _), (weight, bias) = rows_of(layer)

        def hook(module, args, made):
            opened = gates.reshape(*args[0].shape[:-1], 1)
            read = twin_inputs(args[0], opened)
            value = torch.nn.functional.linear(read, weight, bias) + opened @ values[layer.name]
            return (
                value
                if len(layer.modules) == 2
                else torch.cat([made[..., : layer.key_width], value], -1)
            )

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in cross_attentions(base):
            module = layer.modules[-1]
            stack.callback(module.register_forward_hook(edited(layer)).remove)
        network = family_of(base).network
        given = twin.encodings
        if network.unpadded:
            given = given[:, : unfilled(given)]
        gates = gates[:, : given.shape[1]]
        more = {"attention_mask": twin.extra} if network.masked else {}
        if network.second is not None:
            given, more = hunyuan_dit_is_given(given, twin.extra)
        denoised = base.apply_model(noisy, sigma, c_crossattn=given, **more)
    # What each prediction is wrong by: noise and flow the error of x0 by sigma, Cosmos by its time,
    # velocity by the share of the noise.
    shares = {"cosmos_predict2": sigma + 1, "hunyuan_dit": (sigma**2 + 1).sqrt()}
    time = sigma / shares.get(name, 1)
    expected = ((denoised - clean) / time.reshape(-1, *[1] * (clean.ndim - 1))).square()
    expected = expected.reshape(found.shape)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-4)
    assert float((plain - expected).abs().max()) / scale > 1e-3


def test_a_concept_is_learned_and_its_file_names_the_family(world, tmp_path):
    name, model, clip, _ = world
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    covariance = measure_covariance(clip, CAPTIONS, model=model)
    config = TrainingConfig(
        placeholder="<thing>", superclass="mug", steps=2, batch_size=2, mode="twin_lock"
    )
    with view_of(world) as view:
        result = train_concept(view, config, covariance)
    assert result.error is None
    assert result.steps == 2
    concept = load_concept(save_concept(result.concept, tmp_path / "it.safetensors"))
    family = family_of(model.model)
    assert concept.family == family.name == name
    assert concept.i.shape == (family.width,)
    assert {key: value.shape[-1] for key, value in concept.embeddings.items()} == family.vectors
    assert list(concept.o_v) == [layer.name for layer in cross_attentions(model.model)]
    comfy.model_management.unload_all_models()
    after = model.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_the_covariance_counts_words_and_their_end_token(world):
    _, model, clip, _ = world
    covariance = measure_covariance(clip, CAPTIONS, positions="words", model=model)
    counts = [
        len(clip.tokenize(caption, min_length=1)[name][0])
        # Of two text encoders, start tokens do not count.
        - int(name == "hydit_clip")
        for caption in CAPTIONS
        for name in family_of(model.model).positions
    ]
    assert covariance.tokens == sum(counts)
    assert covariance.width == family_of(model.model).width


def test_the_covariance_of_all_positions_counts_padding_too(world):
    _, model, clip, _ = world
    covariance = measure_covariance(clip, CAPTIONS, positions="all", model=model)
    words = measure_covariance(clip, CAPTIONS, positions="words", model=model)
    names = family_of(model.model).positions
    filled = sum(len(clip.tokenize(each)[name][0]) for each in CAPTIONS for name in names)
    # Anima's adapter fills what it makes up to 512 tokens.
    if family_of(model.model).network.adapts:
        filled = 512 * len(CAPTIONS)
    assert covariance.tokens == filled
    assert covariance.tokens >= words.tokens
    assert covariance.captions == words.captions == len(CAPTIONS)
