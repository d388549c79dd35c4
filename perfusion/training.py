"""Learning a concept from a few pictures (Perfusion, section 4; method section 3)."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .concept import Concept
from .covariance import Covariance
from .denoiser import Batch, Denoiser, Encoded
from .key_lock import locked_outputs
from .losses import masked_mean
from .prompts import fill
from .rank_one import Direction, GatedEdit, gated_inputs
from .training_config import Mode, Schedule, TrainingConfig

log = logging.getLogger("perfusion")

__all__ = [
    "Batch",
    "Denoiser",
    "Encoded",
    "Mode",
    "Schedule",
    "TrainingConfig",
    "TrainingResult",
    "train_concept",
]


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """What a run learned: the concept after ``steps`` good steps, and the loss of each.

    ``error`` is None, or says why training stopped early (NaN) with the concept as it was before.
    """

    concept: Concept
    losses: tuple[float, ...]
    steps: int
    error: str | None = None


def train_concept(
    denoiser: Denoiser,
    config: TrainingConfig,
    covariance: Covariance,
    on_step: Callable[[int, float], None] | None = None,
    on_partial: Callable[[TrainingResult], None] | None = None,
) -> TrainingResult:
    """Train a concept; everything of ``denoiser`` stays frozen.

    ``on_step(step, loss)`` is called after each step, counted from 1, and may raise. Whatever is
    raised, from there or from the denoiser, BaseException included, ``on_partial(result)``
    receives the last good state first and the exception then goes on its way. A NaN ends the
    training with a result whose ``error`` says so. Everything random comes from one generator
    seeded with ``config.seed``.

    The superclass encoding, to which keys are locked and at which i and o_V start, is the mean
    over all templates of the encoding of the superclass's last sub-word: the only one of its
    sub-words that has seen the whole word where text is encoded from left to right.

    Raises ValueError when there are no images, layers or prompts to work with, and when the
    covariance was not measured with this model's encoder.
    """
    run = _Run(denoiser, config, covariance)
    try:
        while run.steps < config.steps:
            error = run.step()
            if error is not None:
                log.warning("training of %s stopped: %s", config.placeholder, error)
                return run.result(error)
            if on_step is not None:
                on_step(run.steps, run.losses[-1])
    except BaseException:
        # An interrupt is a BaseException; what was learned must not be lost with it.
        if on_partial is not None:
            on_partial(run.result())
        raise
    return run.result()


@dataclass(frozen=True, eq=False)
class _State:
    """What was learned after some step, detached and cloned."""

    embeddings: dict[str, Tensor]
    o_v: dict[str, Tensor]
    o_k: dict[str, Tensor]
    i: Tensor


class _Run:
    """The moving parts of one training run."""

    def __init__(self, denoiser: Denoiser, config: TrainingConfig, covariance: Covariance) -> None:
        _check(denoiser, covariance)
        self.denoiser = denoiser
        self.config = config
        self.covariance = covariance
        self.losses: list[float] = []
        self.generator = torch.Generator().manual_seed(config.seed)
        encoding = _superclass_encoding(denoiser, config)
        self.superclass_encoding = encoding
        self.i = encoding.to("cpu", torch.float64)
        covariance.dual(self.i)  # a covariance of another width is an error before any work
        layers = denoiser.layers
        keys = locked_outputs(lambda layer, e: denoiser.project(layer, "k", e), layers, encoding)
        values = locked_outputs(lambda layer, e: denoiser.project(layer, "v", e), layers, encoding)
        self.edits = config.mode != "textual_inversion"
        trains_keys = config.mode == "trained_keys"
        self.embeddings = _parameters(denoiser.initial_embeddings(), True)
        self.values = _parameters(values, self.edits)
        self.keys = _parameters(keys, trains_keys)
        outputs = [p for p in (*self.values.values(), *self.keys.values()) if p.requires_grad]
        groups = [{"params": [*self.embeddings.values()], "lr": config.embedding_learning_rate}]
        if outputs:
            groups.append({"params": outputs, "lr": config.learning_rate})
        self.optimizer = torch.optim.Adam(groups)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.good = self._snapshot()

    @property
    def steps(self) -> int:
        return len(self.losses)

    def step(self) -> str | None:
        """One optimiser step; returns why training cannot go on, or None."""
        number = self.steps + 1
        self.optimizer.zero_grad()
        batch, prompts = self._draw()
        with torch.enable_grad():
            encoded = self.denoiser.encode(prompts, self.embeddings)
            newest = _last_marked(encoded, prompts, self.config.placeholder).detach().mean(0)
            if not bool(torch.isfinite(newest).all()):
                return f"the text encoding of step {number} holds NaN or infinity"
            self._follow(newest)
            loss = self._loss(batch, encoded)
        if not bool(torch.isfinite(loss)):
            return f"the loss of step {number} is {float(loss.detach())}"
        loss.backward()
        self._check_gradients()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._decay()
        self.optimizer.step()
        state = self._snapshot()
        learned = (state.embeddings, state.o_v, state.o_k)
        for tensor in (tensor for tensors in learned for tensor in tensors.values()):
            if not bool(torch.isfinite(tensor).all()):
                return f"step {number} made NaN or infinity; try a smaller learning rate"
        self.losses.append(float(loss.detach()))
        self.good = state
        return None

    def result(self, error: str | None = None) -> TrainingResult:
        """The last good state as a concept."""
        config, state = self.config, self.good
        settings = config.settings() | {
            "steps": self.steps,
            "images": self.denoiser.image_count,
        }
        concept = Concept(
            family=self.denoiser.family,
            placeholder=config.placeholder,
            superclass=config.superclass,
            embeddings=state.embeddings,
            i=state.i.float(),
            u=self.covariance.dual(state.i).float(),
            superclass_encoding=self.superclass_encoding.cpu(),
            o_v=state.o_v,
            o_k=state.o_k if config.mode == "trained_keys" else None,
            # Textual inversion is the placeholder's vector alone: an edit of strength 0.
            strength=1.0 if self.edits else 0.0,
            train_bias=config.bias,
            train_temperature=config.temperature,
            metadata={
                "covariance_hash": self.covariance.digest,
                "encoder_hash": self.denoiser.encoder_hash,
                "training": json.dumps(settings, separators=(",", ":")),
            },
        )
        return TrainingResult(concept, tuple(self.losses), self.steps, error)

    def _follow(self, encoding: Tensor) -> None:
        """Move i towards the concept's encoding (D,): once per step, never per layer."""
        newest = encoding.to("cpu", torch.float64)
        self.i = self.config.ema * self.i + (1 - self.config.ema) * newest

    def _loss(self, batch: Batch, encoded: Encoded) -> Tensor:
        errors = self.denoiser.errors(batch, encoded, self._edit(encoded) if self.edits else None)
        return masked_mean(errors, self.denoiser.masks(batch.indices), self.config.background)

    def _draw(self) -> tuple[Batch, list[str]]:
        """Prompts, images and timesteps of a step; images in turn, timesteps stratified."""
        size, images = self.config.batch_size, self.denoiser.image_count
        chosen = torch.randint(len(self.config.templates), (size,), generator=self.generator)
        templates = [self.config.templates[index] for index in chosen.tolist()]
        rounds = math.ceil(size / images)
        turns = [torch.randperm(images, generator=self.generator) for _ in range(rounds)]
        strata = torch.arange(size) + torch.rand(size, generator=self.generator)
        # The last stratum may round up to 1, which is outside the schedule.
        timesteps = (strata / size).clamp(max=1 - 2**-24)
        batch = Batch(torch.cat(turns)[:size], timesteps, self.generator)
        return batch, [fill(template, self.config.placeholder) for template in templates]

    def _edit(self, encoded: Encoded) -> GatedEdit:
        direction = Direction(
            i=self.i,
            u=self.covariance.dual(self.i),
            bias=self.config.bias,
            temperature=self.config.temperature,
            name=self.config.placeholder,
        )
        inputs, gates = gated_inputs(encoded.encodings, [direction])
        keys = {layer: output[None] for layer, output in self.keys.items()}
        values = {layer: output[None] for layer, output in self.values.items()}
        return GatedEdit(inputs, gates, keys, values)

    def _decay(self) -> float:
        if self.config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * self.steps / self.config.steps))

    def _check_gradients(self) -> None:
        named = {f"the embedding {name}": p for name, p in self.embeddings.items()}
        named |= {f"the value output of {layer}": p for layer, p in self.values.items()}
        named |= {f"the key output of {layer}": p for layer, p in self.keys.items()}
        for name, parameter in named.items():
            if parameter.requires_grad and parameter.grad is None:
                raise ValueError(
                    f"{name}: expected the loss to depend on it, found no gradient; "
                    "the model did not use it, so it cannot be trained"
                )

    def _snapshot(self) -> _State:
        def copied(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}

        return _State(copied(self.embeddings), copied(self.values), copied(self.keys), self.i)


def _check(denoiser: Denoiser, covariance: Covariance) -> None:
    if denoiser.image_count < 1:
        raise ValueError("expected at least one training image, found none")
    if not denoiser.layers:
        raise ValueError(
            f"expected cross-attention layers over text in the {denoiser.family} model, found none"
        )
    if covariance.encoder_hash != denoiser.encoder_hash:
        raise ValueError(
            f"expected a covariance of this model's text encoder ({denoiser.encoder_hash}), found "
            f"one of {covariance.encoder_hash}; measure it again with this model"
        )
    masks = denoiser.masks(torch.arange(denoiser.image_count))
    if masks is None:
        return
    for index, mask in enumerate(masks):
        if not (bool(torch.isfinite(mask).all()) and float(mask.min()) >= 0 < float(mask.max())):
            raise ValueError(
                f"expected a mask of finite weights from 0 with some above it for image {index}, "
                f"found {float(mask.min())} to {float(mask.max())}"
            )


def _superclass_encoding(denoiser: Denoiser, config: TrainingConfig) -> Tensor:
    """Mean over the templates of the superclass's last sub-word, (D,) fp32."""
    tokens = []
    with torch.no_grad():
        for start in range(0, len(config.templates), config.batch_size):
            templates = config.templates[start : start + config.batch_size]
            prompts = [fill(template, config.superclass) for template in templates]
            encoded = denoiser.encode_superclass(prompts)
            tokens.append(_last_marked(encoded, prompts, config.superclass))
    encoding = torch.cat(tokens).float().mean(0)
    if not bool(torch.isfinite(encoding).all()):
        raise ValueError(
            f"expected a finite encoding of {config.superclass!r}, found NaN or infinity; "
            "check the text encoder"
        )
    return encoding


def _last_marked(encoded: Encoded, prompts: list[str], word: str) -> Tensor:
    """The encodings (B, D) at the last marked position of each prompt."""
    mask = encoded.mask.to(encoded.encodings.device)
    if mask.shape != encoded.encodings.shape[:2] or mask.shape[0] != len(prompts):
        raise ValueError(
            f"expected a mask {(len(prompts), encoded.encodings.shape[1])} for {len(prompts)} "
            f"prompts, found {tuple(mask.shape)}"
        )
    for prompt, present in zip(prompts, mask.any(dim=1).tolist(), strict=True):
        if not present:
            raise ValueError(f"expected {word!r} in every prompt, found {prompt!r} without it")
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(dim=1)
    return encoded.encodings[torch.arange(len(prompts), device=mask.device), last]


def _parameters(tensors: Mapping[str, Tensor], trainable: bool) -> dict[str, Tensor]:
    return {
        name: tensor.detach().float().clone().requires_grad_(trainable)
        for name, tensor in tensors.items()
    }
