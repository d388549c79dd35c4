"""Concepts of the sizes real model families have."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch

from perfusion.concept.concept import Concept
from perfusion.text.encoded_prompt import EncodedPrompt
from tests.method.tiny_diffusion import covariance, denoiser, networks

__all__ = ["covariance", "denoiser", "networks"]


def sd1_layers() -> dict[str, int]:
    """Every attn2 of SD1.x's UNet under the names ComfyUI gives them, 12,480 values in all."""
    inputs = {1: 320, 2: 320, 4: 640, 5: 640, 7: 1280, 8: 1280}
    outputs = {3: 1280, 4: 1280, 5: 1280, 6: 640, 7: 640, 8: 640, 9: 320, 10: 320, 11: 320}
    ending = "1.transformer_blocks.0.attn2"
    return {
        **{f"input_blocks.{block}.{ending}": size for block, size in inputs.items()},
        f"middle_block.{ending}": 1280,
        **{f"output_blocks.{block}.{ending}": size for block, size in outputs.items()},
    }


def sdxl_layers() -> dict[str, int]:
    """Every attn2 of SDXL's UNet: 70 of them, 83,200 values in all."""
    depths = {f"input_blocks.{n}": (640, 2) for n in (4, 5)}
    depths |= {f"input_blocks.{n}": (1280, 10) for n in (7, 8)}
    depths |= {"middle_block": (1280, 10)}
    depths |= {f"output_blocks.{n}": (1280, 10) for n in (0, 1, 2)}
    depths |= {f"output_blocks.{n}": (640, 2) for n in (3, 4, 5)}
    return {
        f"{block}.1.transformer_blocks.{index}.attn2": size
        for block, (size, depth) in depths.items()
        for index in range(depth)
    }


def make_concept(
    family: str,
    layers: Mapping[str, int],
    encoders: Mapping[str, int],
    width: int,
    trained_keys: bool = False,
) -> Concept:
    """A concept of these sizes, with everything training records about itself."""
    random = torch.Generator().manual_seed(5)

    def vector(size: int) -> torch.Tensor:
        return torch.randn(size, generator=random)

    i = vector(width)
    settings = {
        "steps": 400,
        "batch_size": 16,
        "learning_rate": 0.03,
        "embedding_learning_rate": 0.006,
        "ema": 0.99,
        "background": 0.0,
        "seed": 2**64 - 1,
        "mode": "perfusion",
        "schedule": "constant",
        "images": 6,
    }
    return Concept(
        family=family,
        placeholder="<my-cat>",
        superclass="cat",
        embeddings={name: vector(size) for name, size in encoders.items()},
        i=i,
        u=i * torch.rand(width, generator=random),
        superclass_encoding=vector(width),
        o_v={name: vector(size) for name, size in layers.items()},
        o_k={name: vector(size) for name, size in layers.items()} if trained_keys else None,
        metadata={
            "covariance_hash": "0123456789abcdef",
            "encoder_hash": "fedcba9876543210",
            "training": json.dumps(settings, separators=(",", ":")),
        },
    )


@pytest.fixture(scope="session")
def sd1_concept() -> Concept:
    return make_concept("sd1", sd1_layers(), {"l": 768}, 768)


@pytest.fixture(scope="session")
def sdxl_concept() -> Concept:
    return make_concept("sdxl", sdxl_layers(), {"l": 768, "g": 1280}, 2048)


@pytest.fixture(scope="session")
def small_concept() -> Concept:
    """Small enough to damage its file in hundreds of ways."""
    layers = {f"blocks.{n}.attn2": 6 + n for n in range(3)}
    return make_concept("small_world", layers, {"l": 8}, 8)


@pytest.fixture(scope="session")
def trained_keys_concept() -> Concept:
    return make_concept("small_world", {"a.attn2": 6, "b.attn2": 4}, {"l": 8}, 8, trained_keys=True)


TOY_WIDTH, TOY_LENGTH = 24, 12
START, END, PAD = 1, 2, 0


class ToyText:
    """A text encoder to check by hand, causal like CLIP's: an encoding depends on all before it.

    Words are split into sub-words at '-'.
    """

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def token(self, piece: str) -> int:
        return self.ids.setdefault(piece, len(self.ids) + 3)

    def __call__(self, prompts) -> list[EncodedPrompt]:
        return [self.prompt(text) for text in prompts]

    def prompt(self, text: str) -> EncodedPrompt:
        pieces = []
        for word in text.lower().split():
            parts = word.split("-")
            pieces += [*parts[:-1], parts[-1] + " "]
        tokens = [START, *(self.token(piece) for piece in pieces), END]
        assert len(tokens) <= TOY_LENGTH, text
        padding = TOY_LENGTH - len(tokens)
        tokens += [PAD] * padding
        shown = ["<start>", *pieces, "<end>", *["<pad>"] * padding]
        state, rows = torch.zeros(TOY_WIDTH, dtype=torch.float64), []
        for token in tokens:
            generator = torch.Generator().manual_seed(token)
            own = torch.randn(TOY_WIDTH, generator=generator, dtype=torch.float64)
            state = 0.5 * state + own
            rows.append(state)
        return EncodedPrompt(
            text, tuple(tokens), tuple(shown), 1, len(pieces) + 1, torch.stack(rows)
        )


@pytest.fixture
def toy() -> ToyText:
    """Encodes prompts of few words."""
    return ToyText()
