"""A small text-to-image network of the tests' own: a real one, trained here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from perfusion.gated.covariance import Covariance, CovarianceAccumulator
from perfusion.gated.key_lock import locked_outputs
from perfusion.gated.rank_one import GatedProjections, Part, gated_inputs
from perfusion.text.prompts import fill
from perfusion.training.config import TrainingConfig
from perfusion.training.denoiser import Batch, Conditioning, Projections
from perfusion.training.results import TrainingResult

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
        self.value_unit = 1.0


class TinyUNet(nn.Module):
    """Pixels as tokens, two cross-attention layers; predicts the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, FEATURES)
        self.attention = nn.ModuleDict({"low": TinyAttention(), "high": TinyAttention()})
        self.mixing = nn.ModuleDict({n: nn.Linear(FEATURES, FEATURES) for n in ("low", "high")})
        self.leave = nn.Linear(FEATURES, 3)

    def forward(
        self, noised: Tensor, time: Tensor, text: Tensor, edit: Projections | None = None
    ) -> Tensor:
        pixels = noised.flatten(2).mT  # B C h w -> B (h w) C
        clock = time[:, None, None].expand(-1, pixels.shape[1], 1)
        hidden = self.enter(torch.cat([pixels, clock], dim=-1))
        for name, layer in self.attention.items():
            if edit is None:
                k, v = layer.to_k(text), layer.to_v(text)
            else:
                k, v = (edit.apply(getattr(layer, f"to_{p}"), name, p) for p in ("k", "v"))
            v = v / layer.value_unit
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
        self.widths: dict[int, int] = {}
        self.variant_count = 1
        self.needs_scaling = False
        self.data_hash = "tiny-data"
        self.released = 0

    @property
    def image_count(self) -> int:
        return self.images.shape[0]

    def initial_embeddings(self) -> dict[str, Tensor]:
        ids = [WORDS.index(word) for word in self.superclass.split()]
        return {"l": self.text.tokens.weight[ids].mean(0)}

    def encode(self, prompts: Sequence[str], embeddings: Mapping[str, Tensor]) -> Conditioning:
        ids = token_ids(prompts)
        mask = ids == WORDS.index("sks")
        vectors = torch.where(mask[..., None], embeddings["l"], self.text.tokens(ids))
        return Conditioning(self.text(vectors), mask)

    def encode_superclass(self, prompts: Sequence[str]) -> Conditioning:
        ids = token_ids(prompts)
        wanted = torch.tensor([WORDS.index(word) for word in self.superclass.split()])
        return Conditioning(self.text(self.text.tokens(ids)), torch.isin(ids, wanted))

    def random_embeddings(self) -> dict[str, Tensor]:
        last = self.text.tokens.weight[WORDS.index(self.superclass.split()[-1])]
        vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))
        return {"l": vector * last.norm() / vector.norm()}

    def encode_twins(
        self, prompts: Sequence[str], embeddings: Mapping[str, Tensor]
    ) -> tuple[Conditioning, Conditioning]:
        words = self.superclass.split()
        # The last sub-word of the superclass is where the placeholder's vector stands.
        ids = token_ids(
            [prompt.replace("sks", " ".join([*words[:-1], "sks"])) for prompt in prompts]
        )
        mask = ids == WORDS.index("sks")
        twin = torch.where(mask, torch.tensor(WORDS.index(words[-1])), ids)
        vectors = torch.where(mask[..., None], embeddings["l"], self.text.tokens(ids))
        named = Conditioning(self.text(vectors), mask)
        return named, Conditioning(self.text(self.text.tokens(twin)), mask)

    def release_text(self) -> None:
        self.released += 1

    def token_rms(self, encoder: str) -> float:
        return float(self.text.tokens.weight.square().mean().sqrt())

    def project(self, layer: str, part: Part, encodings: Tensor) -> Tensor:
        return getattr(self.unet.attention[layer], f"to_{part}")(encodings)

    def errors(self, batch: Batch, encoded: Conditioning, edit: Projections | None) -> Tensor:
        images = self.images[batch.indices]
        images = torch.where((batch.variants == 1)[:, None, None, None], images.flip(-1), images)
        images = images[..., : self.shape(int(batch.indices[0]))[1]]
        noise = batch.noise(*images.shape[1:])
        return noise_errors(self.unet, images, batch.timesteps, encoded.encodings, edit, noise)

    def masks(self, batch: Batch) -> Tensor | None:
        return None if self.mask_maps is None else self.mask_maps[batch.indices]

    def shape(self, index: int) -> tuple[int, int]:
        return SIDE, self.widths.get(index, SIDE)


def token_ids(prompts: Sequence[str]) -> Tensor:
    rows = [[WORDS.index(word) for word in prompt.split()] for prompt in prompts]
    return torch.tensor([row + [0] * (TOKENS - len(row)) for row in rows])


def noise_errors(
    unet: TinyUNet,
    images: Tensor,
    times: Tensor,
    text: Tensor,
    edit: Projections | None,
    noise: Tensor,
) -> Tensor:
    angle = (0.15 + 0.7 * times)[:, None, None, None] * math.pi / 2
    noised = angle.cos() * images + angle.sin() * noise
    return (unet(noised, times, text, edit) - noise) ** 2 * (angle.tan() ** 2).clamp(max=4)


def flat_images(colour: Sequence[float], count: int, random: torch.Generator) -> Tensor:
    shade = 0.1 * torch.randn(count, 3, 1, 1, generator=random)
    return torch.tensor(colour).reshape(1, 3, 1, 1) + shade.expand(-1, 3, SIDE, SIDE)


@pytest.fixture(scope="session")
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
        noise = torch.randn(images.shape, generator=random)
        loss = noise_errors(unet, images, times, encodings, None, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return text.requires_grad_(False), unet.requires_grad_(False)


@pytest.fixture
def denoiser(networks) -> TinyDenoiser:
    return TinyDenoiser(*networks, flat_images(THING, 5, torch.Generator().manual_seed(3)), "cat")


@pytest.fixture(scope="session")
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
        edit = edit_of(denoiser, result, encodings) if concept.gate.strength else None
    with torch.no_grad():
        noise = torch.randn(images.shape, generator=random)
        errors = noise_errors(denoiser.unet, images, times, encodings, edit, noise)
    return float(errors.mean())


def edit_of(denoiser: TinyDenoiser, result: TrainingResult, encodings: Tensor) -> GatedProjections:
    concept = result.concept
    locked = locked_outputs(
        lambda layer, e: denoiser.project(layer, "k", e),
        denoiser.layers,
        concept.superclass_encoding,
    )
    inputs, gates = gated_inputs(encodings, [concept.direction()])
    return GatedProjections(
        inputs,
        gates,
        {name: output[None] for name, output in (concept.o_k or locked).items()},
        {name: output[None] for name, output in concept.o_v.items()},
    )
