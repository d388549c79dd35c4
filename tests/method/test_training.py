"""Training on a small text-to-image network of the test's own: a real one, trained here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from perfusion.covariance import Covariance, CovarianceAccumulator
from perfusion.key_lock import locked_outputs
from perfusion.prompts import fill
from perfusion.rank_one import GatedEdit, Part, edit_projection, gated_inputs, similarities
from perfusion.training import (
    Batch,
    Encoded,
    TrainingConfig,
    TrainingResult,
    train_concept,
)

WORDS = ["<end>", "a", "photo", "of", "the", "my", "one", "cat", "dog", "bird", "bath", "sks"]
COLOURS = {"cat": (0.9, -0.8, -0.7), "dog": (-0.8, 0.9, -0.6), "bird": (-0.7, -0.6, 0.9)}
THING = (0.8, 0.7, -0.9)  # a colour without a word
TEMPLATES = ("a {}", "a photo of a {}", "the {}", "a photo of my {}")
TOKENS, WIDTH, FEATURES, SIDE = 7, 16, 24, 4


class TinyText(nn.Module):
    """Token vectors through one causal self-attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(WORDS), WIDTH)
        self.positions = nn.Parameter(0.2 * torch.randn(TOKENS, WIDTH))
        self.mixing = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, vectors: Tensor) -> Tensor:
        hidden = vectors + self.positions
        q, k, v = self.mixing(hidden).chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return functional.layer_norm(hidden + self.out(mixed), (WIDTH,))


class TinyAttention(nn.Module):
    """Cross-attention from pixels to text."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(FEATURES, FEATURES, bias=False)
        self.to_k = nn.Linear(WIDTH, FEATURES, bias=False)
        self.to_v = nn.Linear(WIDTH, FEATURES, bias=False)


class TinyUNet(nn.Module):
    """Pixels as tokens, two cross-attention layers; predicts the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, FEATURES)
        self.attention = nn.ModuleDict({"low": TinyAttention(), "high": TinyAttention()})
        self.mixing = nn.ModuleDict({n: nn.Linear(FEATURES, FEATURES) for n in ("low", "high")})
        self.leave = nn.Linear(FEATURES, 3)

    def forward(
        self, noised: Tensor, time: Tensor, text: Tensor, edit: GatedEdit | None = None
    ) -> Tensor:
        pixels = noised.flatten(2).mT  # B C h w -> B (h w) C
        clock = time[:, None, None].expand(-1, pixels.shape[1], 1)
        hidden = self.enter(torch.cat([pixels, clock], dim=-1))
        for name, layer in self.attention.items():
            if edit is None:
                k, v = layer.to_k(text), layer.to_v(text)
            else:
                k, v = (edit.apply(getattr(layer, f"to_{p}"), name, p) for p in ("k", "v"))
            read = functional.scaled_dot_product_attention(layer.to_q(hidden), k, v)
            hidden = hidden + functional.gelu(self.mixing[name](hidden + read))
        return self.leave(hidden).mT.reshape(noised.shape)


class TinyDenoiser:
    """The `Denoiser` protocol over the two networks above."""

    family = "tiny"
    encoder_hash = "tiny-text"
    layers: Mapping[str, int] = {"low": FEATURES, "high": FEATURES}

    def __init__(self, text: TinyText, unet: TinyUNet, images: Tensor, superclass: str) -> None:
        self.text, self.unet, self.images = text, unet, images
        self.superclass = superclass
        self.mask_maps: Tensor | None = None

    @property
    def image_count(self) -> int:
        return self.images.shape[0]

    def initial_embeddings(self) -> dict[str, Tensor]:
        ids = [WORDS.index(word) for word in self.superclass.split()]
        return {"l": self.text.tokens.weight[ids].mean(0)}

    def encode(self, prompts: Sequence[str], embeddings: Mapping[str, Tensor]) -> Encoded:
        ids = token_ids(prompts)
        mask = ids == WORDS.index("sks")
        vectors = torch.where(mask[..., None], embeddings["l"], self.text.tokens(ids))
        return Encoded(self.text(vectors), mask)

    def encode_superclass(self, prompts: Sequence[str]) -> Encoded:
        ids = token_ids(prompts)
        wanted = torch.tensor([WORDS.index(word) for word in self.superclass.split()])
        return Encoded(self.text(self.text.tokens(ids)), torch.isin(ids, wanted))

    def project(self, layer: str, part: Part, encodings: Tensor) -> Tensor:
        return getattr(self.unet.attention[layer], f"to_{part}")(encodings)

    def errors(self, batch: Batch, encoded: Encoded, edit: GatedEdit | None) -> Tensor:
        return noise_errors(
            self.unet,
            self.images[batch.indices],
            batch.timesteps,
            encoded.encodings,
            edit,
            batch.generator,
        )

    def masks(self, indices: Tensor) -> Tensor | None:
        return None if self.mask_maps is None else self.mask_maps[indices]


def token_ids(prompts: Sequence[str]) -> Tensor:
    rows = [[WORDS.index(word) for word in prompt.split()] for prompt in prompts]
    return torch.tensor([row + [0] * (TOKENS - len(row)) for row in rows])


def noise_errors(
    unet: TinyUNet,
    images: Tensor,
    times: Tensor,
    text: Tensor,
    edit: GatedEdit | None,
    generator: torch.Generator,
) -> Tensor:
    noise = torch.randn(images.shape, generator=generator)
    angle = (0.15 + 0.7 * times)[:, None, None, None] * math.pi / 2
    noised = angle.cos() * images + angle.sin() * noise
    return (unet(noised, times, text, edit) - noise) ** 2 * (angle.tan() ** 2).clamp(max=4)


def flat_images(colour: Sequence[float], count: int, random: torch.Generator) -> Tensor:
    shade = 0.1 * torch.randn(count, 3, 1, 1, generator=random)
    return torch.tensor(colour).reshape(1, 3, 1, 1) + shade.expand(-1, 3, SIDE, SIDE)


@pytest.fixture(scope="module")
def networks() -> tuple[TinyText, TinyUNet]:
    """Networks that have learned what colour a cat, a dog and a bird have."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text, unet = TinyText(), TinyUNet()
    random = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([*text.parameters(), *unet.parameters()], lr=5e-3)
    prompts = [fill(template, name) for name in COLOURS for template in TEMPLATES]
    ids = token_ids(prompts).repeat(4, 1)
    images = torch.cat([flat_images(COLOURS[name], len(TEMPLATES), random) for name in COLOURS])
    images = images.repeat(4, 1, 1, 1)
    for _ in range(300):
        times = torch.rand(len(images), generator=random)
        encodings = text(text.tokens(ids))
        loss = noise_errors(unet, images, times, encodings, None, random).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return text.requires_grad_(False), unet.requires_grad_(False)


@pytest.fixture
def denoiser(networks) -> TinyDenoiser:
    return TinyDenoiser(*networks, flat_images(THING, 5, torch.Generator().manual_seed(3)), "cat")


@pytest.fixture(scope="module")
def covariance(networks) -> Covariance:
    text, _ = networks
    accumulator = CovarianceAccumulator(WIDTH, "words", "tiny-text")
    for word in ("cat", "dog", "bird", "bath"):
        ids = token_ids([fill(template, word) for template in TEMPLATES])
        mask = (ids != 0) | (torch.cumsum(ids == 0, dim=1) == 1)
        accumulator.add(text(text.tokens(ids)), mask)
    return accumulator.result(ridge=1e-3)


def config(**changes: Any) -> TrainingConfig:
    small = TrainingConfig("sks", "cat", steps=6, batch_size=4, templates=TEMPLATES, seed=9)
    return replace(small, **changes)


def everything(result: TrainingResult) -> list[Tensor]:
    concept = result.concept
    return [
        *concept.embeddings.values(),
        *concept.o_v.values(),
        *(concept.o_k or {}).values(),
        concept.i,
        concept.u,
        torch.tensor(result.losses),
    ]


def assert_identical(one: TrainingResult, other: TrainingResult) -> None:
    for ours, theirs in zip(everything(one), everything(other), strict=True):
        assert torch.equal(ours, theirs)


def colour_error(denoiser: TinyDenoiser, result: TrainingResult | None) -> float:
    """Mean loss on the thing's images, by the concept as it is used, or by the superclass word."""
    random = torch.Generator().manual_seed(77)
    prompts = [fill(TEMPLATES[n % 4], "cat" if result is None else "sks") for n in range(200)]
    images = denoiser.images[torch.arange(200) % denoiser.image_count]
    times = torch.linspace(0, 0.99, 200)
    if result is None:
        encodings, edit = denoiser.encode_superclass(prompts).encodings, None
    else:
        concept = result.concept
        encodings = denoiser.encode(prompts, concept.embeddings).encodings
        edit = edit_of(denoiser, result, encodings) if concept.strength else None
    with torch.no_grad():
        errors = noise_errors(denoiser.unet, images, times, encodings, edit, random)
    return float(errors.mean())


def edit_of(denoiser: TinyDenoiser, result: TrainingResult, encodings: Tensor) -> GatedEdit:
    concept = result.concept
    locked = locked_outputs(
        lambda layer, e: denoiser.project(layer, "k", e),
        denoiser.layers,
        concept.superclass_encoding,
    )
    inputs, gates = gated_inputs(encodings, [concept.direction()])
    return GatedEdit(
        inputs,
        gates,
        {name: output[None] for name, output in (concept.o_k or locked).items()},
        {name: output[None] for name, output in concept.o_v.items()},
    )


def test_a_trained_concept_shows_the_thing_its_superclass_could_not(denoiser, covariance):
    result = train_concept(denoiser, config(steps=150, batch_size=8), covariance)
    word, concept = colour_error(denoiser, None), colour_error(denoiser, result)
    assert result.error is None
    assert concept < 0.4 * word
    assert sum(result.losses[-20:]) < 0.5 * sum(result.losses[:20])


def test_the_gate_opens_for_the_concept_and_stays_closed_for_other_words(denoiser, covariance):
    concept = train_concept(denoiser, config(steps=60), covariance).concept
    encoded = denoiser.encode(["a photo of my sks", "a photo of the dog"], concept.embeddings)
    similarity = similarities(encoded.encodings, [concept.direction()])[..., 0]
    assert float(similarity[0, 4]) > 0.8
    assert float(similarity[1, 4]) < 0.5


def test_the_model_is_left_exactly_as_it_was(denoiser, covariance):
    modules = {"text": denoiser.text, "unet": denoiser.unet}
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in modules.items()}
    train_concept(denoiser, config(), covariance)
    for name, module in modules.items():
        assert all(torch.equal(before[name][k], v) for k, v in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())


def test_training_starts_at_the_superclass_with_its_keys_locked(denoiser, covariance):
    seen: list[GatedEdit] = []
    original = denoiser.errors

    def watched(batch: Batch, encoded: Encoded, edit: GatedEdit | None) -> Tensor:
        assert edit is not None
        keys = {name: output.detach().clone() for name, output in edit.keys.items()}
        values = {name: output.detach().clone() for name, output in edit.values.items()}
        seen.append(replace(edit, keys=keys, values=values))
        return original(batch, encoded, edit)

    denoiser.errors = watched  # type: ignore[method-assign]
    concept = train_concept(denoiser, config(steps=3), covariance).concept
    encoded = denoiser.encode_superclass([fill(template, "cat") for template in TEMPLATES])
    expected = encoded.encodings[encoded.mask].mean(0)
    torch.testing.assert_close(concept.superclass_encoding, expected)
    for name in denoiser.layers:
        key = denoiser.project(name, "k", expected)[None]
        torch.testing.assert_close(
            seen[0].values[name], denoiser.project(name, "v", expected)[None]
        )
        for edit in seen:
            torch.testing.assert_close(edit.keys[name], key)
        assert not torch.equal(seen[1].values[name], seen[0].values[name])


def test_the_edit_training_uses_is_equation_three_with_the_followed_input(denoiser, covariance):
    seen: list[tuple[Tensor, GatedEdit]] = []
    original = denoiser.errors

    def watched(batch: Batch, encoded: Encoded, edit: GatedEdit | None) -> Tensor:
        assert edit is not None
        seen.append((encoded.encodings, edit))
        return original(batch, encoded, edit)

    denoiser.errors = watched  # type: ignore[method-assign]
    result = train_concept(denoiser, config(steps=1, ema=0.3), covariance)
    encodings, edit = seen[0]
    direction = result.concept.with_gate(bias=0.75, temperature=0.1).direction()
    layer = denoiser.unet.attention["low"]
    expected = edit_projection(layer.to_k.weight, encodings, [direction], edit.keys["low"])
    torch.testing.assert_close(edit.apply(layer.to_k, "low", "k"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ema", [1.0, 0.0, 0.9])
def test_the_input_follows_the_concepts_encoding_once_per_step(ema, denoiser, covariance):
    means: list[Tensor] = []
    original = denoiser.encode

    def watched(prompts: Sequence[str], embeddings: Mapping[str, Tensor]) -> Encoded:
        encoded = original(prompts, embeddings)
        means.append(encoded.encodings[encoded.mask].detach().mean(0))
        return encoded

    denoiser.encode = watched  # type: ignore[method-assign]
    concept = train_concept(denoiser, config(steps=4, ema=ema), covariance).concept
    expected = concept.superclass_encoding
    for mean in means:
        expected = ema * expected + (1 - ema) * mean
    assert len(means) == 4
    torch.testing.assert_close(concept.i, expected)
    torch.testing.assert_close(concept.u.double(), covariance.dual(concept.i), rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_identical_results_whatever_the_global_generator(denoiser, covariance):
    torch.manual_seed(1)
    one = train_concept(denoiser, config(), covariance)
    torch.manual_seed(2)
    assert_identical(one, train_concept(denoiser, config(), covariance))
    other = train_concept(denoiser, config(seed=10), covariance)
    assert one.losses != other.losses


def test_training_does_not_touch_the_global_generator(denoiser, covariance):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    train_concept(denoiser, config(), covariance)
    assert torch.equal(torch.rand(3), expected)


class Interrupted(BaseException):
    """Like the host's own: no Exception."""


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_an_interrupt_after_any_step_hands_out_what_was_learned_so_far(stop, denoiser, covariance):
    partial: list[TrainingResult] = []

    def interrupt(step: int, loss: float) -> None:
        assert math.isfinite(loss)
        if step == stop:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_concept(denoiser, config(), covariance, interrupt, partial.append)
    assert partial[0].steps == stop
    assert_identical(partial[0], train_concept(denoiser, config(steps=stop), covariance))


@pytest.mark.parametrize("where", ["encode", "errors"])
def test_an_interrupt_inside_the_model_hands_out_the_last_whole_step(where, denoiser, covariance):
    expected = train_concept(denoiser, config(steps=2), covariance)
    original, calls, partial = getattr(denoiser, where), [], []

    def interrupting(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise Interrupted
        return original(*arguments)

    setattr(denoiser, where, interrupting)
    with pytest.raises(Interrupted):
        train_concept(denoiser, config(), covariance, on_partial=partial.append)
    assert len(partial) == 1
    assert_identical(partial[0], expected)


def test_an_ordinary_error_hands_out_the_last_whole_step_too(denoiser, covariance):
    partial: list[TrainingResult] = []

    def fail(step: int, loss: float) -> None:
        raise RuntimeError("no room on the disk")

    with pytest.raises(RuntimeError, match="no room"):
        train_concept(denoiser, config(), covariance, fail, partial.append)
    assert partial[0].steps == 1


def test_nan_in_the_loss_ends_training_with_the_last_good_state(denoiser, covariance):
    expected = train_concept(denoiser, config(steps=2), covariance)
    original, calls = denoiser.errors, []

    def spoiled(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return original(*arguments) * (math.nan if len(calls) == 3 else 1.0)

    denoiser.errors = spoiled  # type: ignore[method-assign]
    result = train_concept(denoiser, config(), covariance)
    assert result.error == "the loss of step 3 is nan"
    assert_identical(result, expected)


def test_a_picture_of_nan_ends_training_before_it_learned_anything_wrong(denoiser, covariance):
    denoiser.images[2] = math.nan
    result = train_concept(denoiser, config(batch_size=5), covariance)
    assert result.error is not None
    assert result.steps == 0
    assert all(tensor.isfinite().all() for tensor in everything(result))


def test_nan_in_the_text_encoding_ends_training_with_the_last_good_state(denoiser, covariance):
    original, calls = denoiser.encode, []

    def spoiled(*arguments: Any) -> Encoded:
        calls.append(arguments)
        encoded = original(*arguments)
        factor = math.nan if len(calls) == 2 else 1.0
        return replace(encoded, encodings=encoded.encodings * factor)

    denoiser.encode = spoiled  # type: ignore[method-assign]
    result = train_concept(denoiser, config(), covariance)
    assert result.error == "the text encoding of step 2 holds NaN or infinity"
    assert result.steps == 1


def test_a_step_with_a_gradient_of_nan_is_not_kept(denoiser, covariance):
    expected = train_concept(denoiser, config(steps=1), covariance)
    original, calls = denoiser.errors, []

    def spoiled(batch: Batch, encoded: Encoded, edit: GatedEdit | None) -> Tensor:
        calls.append(batch)
        errors = original(batch, encoded, edit)
        # The root of zero is finite, its slope is not.
        return errors + (0 * errors).abs().sqrt() if len(calls) == 2 else errors

    denoiser.errors = spoiled  # type: ignore[method-assign]
    result = train_concept(denoiser, config(), covariance)
    assert result.error == "step 2 made NaN or infinity; try a smaller learning rate"
    assert_identical(result, expected)


def test_textual_inversion_trains_the_embedding_alone(denoiser, covariance):
    edits: list[GatedEdit | None] = []
    original = denoiser.errors

    def watched(batch: Batch, encoded: Encoded, edit: GatedEdit | None) -> Tensor:
        edits.append(edit)
        return original(batch, encoded, edit)

    denoiser.errors = watched  # type: ignore[method-assign]
    settings = config(mode="textual_inversion", steps=60, embedding_learning_rate=0.05)
    result = train_concept(denoiser, settings, covariance)
    concept = result.concept
    assert edits == [None] * 60
    assert concept.strength == 0
    for name, output in concept.o_v.items():
        expected = denoiser.project(name, "v", concept.superclass_encoding)
        torch.testing.assert_close(output, expected)
    assert not torch.equal(concept.embeddings["l"], denoiser.initial_embeddings()["l"])
    assert colour_error(denoiser, result) < colour_error(denoiser, None)


def test_trained_keys_move_away_from_the_superclass_and_are_kept(denoiser, covariance):
    concept = train_concept(denoiser, config(mode="trained_keys"), covariance).concept
    assert concept.key_lock == "trained"
    assert concept.o_k is not None
    for name, output in concept.o_k.items():
        locked = denoiser.project(name, "k", concept.superclass_encoding)
        assert float((output - locked).abs().max()) > 1e-3


def test_a_superclass_of_two_words_locks_to_its_last_one_and_starts_at_their_mean(
    denoiser, covariance
):
    denoiser.superclass = "bird bath"
    concept = train_concept(
        denoiser, config(superclass="bird bath", steps=1, embedding_learning_rate=1e-9), covariance
    ).concept
    vectors = denoiser.text.tokens.weight
    mean = (vectors[WORDS.index("bird")] + vectors[WORDS.index("bath")]) / 2
    torch.testing.assert_close(concept.embeddings["l"], mean)
    ids = token_ids([fill(template, "bird bath") for template in TEMPLATES])
    last = denoiser.text(denoiser.text.tokens(ids))[ids == WORDS.index("bath")]
    torch.testing.assert_close(concept.superclass_encoding, last.mean(0))


def test_masked_pixels_teach_nothing(denoiser, covariance):
    masks = torch.zeros(5, 1, SIDE, SIDE)
    masks[..., :2] = 1
    denoiser.mask_maps = masks
    expected = train_concept(denoiser, config(), covariance)
    # Each pixel of this network sees only itself, so other pixels outside the mask change nothing.
    denoiser.images = torch.where(masks.bool(), denoiser.images, torch.full((), 5.0))
    assert_identical(train_concept(denoiser, config(), covariance), expected)
    floor = train_concept(denoiser, config(background=0.5), covariance)
    assert floor.losses != expected.losses


def test_the_cosine_schedule_slows_the_last_steps_down(denoiser, covariance):
    constant = train_concept(denoiser, config(), covariance)
    cosine = train_concept(denoiser, config(schedule="cosine"), covariance)
    assert cosine.losses[:2] == constant.losses[:2]

    def moved(result: TrainingResult) -> float:
        concept = result.concept
        start = denoiser.project("low", "v", concept.superclass_encoding)
        return float((concept.o_v["low"] - start).norm())

    assert moved(cosine) < 0.8 * moved(constant)


def test_every_image_gets_its_turn_and_timesteps_cover_the_schedule(denoiser, covariance):
    batches: list[Batch] = []
    original = denoiser.errors

    def watched(batch: Batch, encoded: Encoded, edit: GatedEdit | None) -> Tensor:
        batches.append(batch)
        return original(batch, encoded, edit)

    denoiser.errors = watched  # type: ignore[method-assign]
    train_concept(denoiser, config(batch_size=7), covariance)
    for batch in batches:
        assert set(batch.indices.tolist()) == set(range(5))
        assert (batch.timesteps * 7).long().tolist() == list(range(7))
        assert float(batch.timesteps.max()) < 1


def test_the_concept_records_how_it_was_made(denoiser, covariance):
    concept = train_concept(denoiser, config(), covariance).concept
    settings = json.loads(concept.metadata["training"])
    assert settings["seed"] == 9
    assert settings["steps"] == 6
    assert settings["images"] == 5
    assert settings["templates"] == list(TEMPLATES)
    assert concept.metadata["covariance_hash"] == covariance.digest
    assert concept.metadata["encoder_hash"] == "tiny-text"
    assert (concept.family, concept.train_bias, concept.train_temperature) == ("tiny", 0.75, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a finite number above 0"),
        ({"embedding_learning_rate": math.inf}, "embedding_learning_rate: expected a finite"),
        ({"temperature": math.nan}, "temperature: expected a finite"),
        ({"bias": math.nan}, "bias: expected a finite"),
        ({"ema": 1.5}, "ema: expected 0 to 1"),
        ({"background": -0.1}, "background: expected 0 to 1"),
        ({"seed": -1}, "seed: expected 0"),
        ({"mode": "lora"}, "mode: expected one of perfusion, textual_inversion, trained_keys"),
        ({"schedule": "linear"}, "schedule: expected one of constant, cosine"),
        ({"placeholder": "my cat"}, "placeholder: expected one word"),
        ({"placeholder": "cat"}, "placeholder: expected another word than the superclass"),
        ({"superclass": " "}, "superclass: expected 1 to 128"),
        ({"templates": ()}, "at least one prompt template"),
        ({"templates": ("a cat",)}, "exactly one {} for the concept, found 'a cat'"),
        ({"templates": ("{} and {}",)}, "exactly one {}"),
        ({"templates": ("a {0} {}",)}, "exactly one {}"),
    ],
)
def test_settings_that_make_no_sense_are_refused_when_made(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_what_cannot_be_trained_is_refused_before_the_first_step(denoiser, covariance):
    def refused(message: str, metric: Covariance = covariance) -> None:
        with pytest.raises(ValueError, match=message):
            train_concept(denoiser, config(), metric)

    other = replace(covariance, encoder_hash="another-text")
    refused("text encoder .tiny-text., found one of another-text", other)
    narrow = replace(covariance, matrix=covariance.matrix[1:, 1:].clone())
    refused(r"shape \(15,\), the covariance's, found \(16,\)", narrow)
    denoiser.superclass = "dog"
    refused("expected 'cat' in every prompt, found 'a cat' without it")
    denoiser.superclass = "cat"
    denoiser.mask_maps = torch.ones(5, 1, SIDE, SIDE)
    denoiser.mask_maps[3] = 0
    refused("some above it for image 3, found 0.0 to 0.0")
    denoiser.mask_maps = None
    denoiser.layers = {}
    refused("cross-attention layers over text in the tiny model, found none")
    denoiser.images = denoiser.images[:0]
    refused("at least one training image")


def test_a_layer_the_model_does_not_use_is_an_error_and_not_silently_skipped(denoiser, covariance):
    denoiser.unet = TinyUNet().requires_grad_(False)
    del denoiser.unet.mixing["high"]
    lone = denoiser.unet.attention["high"]
    del denoiser.unet.attention["high"]
    original = denoiser.project

    def project(layer: str, part: Part, encodings: Tensor) -> Tensor:
        if layer == "high":
            return getattr(lone, f"to_{part}")(encodings)
        return original(layer, part, encodings)

    denoiser.project = project  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"value output of high: .*no gradient"):
        train_concept(denoiser, config(), covariance)


def test_the_gradient_of_the_outputs_agrees_with_finite_differences(denoiser, covariance):
    result = train_concept(denoiser, config(steps=20), covariance)
    concept = result.concept
    text, unet = denoiser.text.double(), denoiser.unet.double()
    images = denoiser.images.double()
    try:
        vector = concept.embeddings["l"].double().requires_grad_()
        values = [output.double().requires_grad_() for output in concept.o_v.values()]

        def loss(embedding: Tensor, low: Tensor, high: Tensor) -> Tensor:
            encoded = denoiser.encode(["a photo of my sks"], {"l": embedding})
            edit = edit_of(denoiser, result, encoded.encodings)
            edit = replace(
                edit,
                keys={name: output.double() for name, output in edit.keys.items()},
                values={"low": low[None], "high": high[None]},
            )
            random = torch.Generator().manual_seed(6)
            noise = torch.randn(images[:1].shape, generator=random, dtype=torch.float64)
            time = torch.full((1,), 0.4, dtype=torch.float64)
            return ((unet(images[:1] + noise, time, encoded.encodings, edit) - noise) ** 2).mean()

        lock = replace(concept, superclass_encoding=concept.superclass_encoding.double())
        result = replace(result, concept=lock)
        assert torch.autograd.gradcheck(loss, (vector, *values))
    finally:
        text.float()
        unet.float()
