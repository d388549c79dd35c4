"""Training of the small world's text-to-image model: text encoder and UNet together."""

import copy
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as comfy_attention
import torch
from comfyui_perfusion.demo.model.small_autoencoder import SmallAutoencoder
from comfyui_perfusion.demo.model.small_model import TIMESTEPS, build_unet
from torch import Tensor, nn

from .attention_maps import attention_loss
from .base_data import Data, load_data
from .muon import Muon, split_parameters
from .networks import Words, alphas_cumprod, build_networks, velocity
from .pool import save_atomically

log = logging.getLogger("demo.train")
SHORT = 32
"""Tokens that most training steps make do with, of a prompt's 77."""


@dataclass(frozen=True)
class BaseConfig:
    """What determines the weights (with the autoencoder): recorded beside them."""

    steps: int
    batch: int
    chunks: int
    seed: int
    matrix_rate: float = 0.01
    other_rate: float = 1e-3
    averaging: float = 0.998
    thing_weight: float = 2.0
    empty_share: float = 0.1
    short_share: float = 0.75
    decay_share: float = 0.5
    full_length_share: float = 0.15
    wide_until: int = 1250
    timesteps: int = TIMESTEPS
    first_chunk: int = 0
    attention_weight: float = 0.0
    place_first: bool = False

    @property
    def decay_start(self) -> int:
        """From this step on the rate falls in a line to 2 %.

        Before it nothing depends on ``steps``: a run can be made longer or shorter while it runs.
        """
        return int(self.steps * (1 - self.decay_share))

    def rate(self, step: int) -> float:
        """Share of the full learning rate at ``step``."""
        left = (self.steps - step) / max(1, self.steps - self.decay_start)
        return min(1.0, (step + 1) / 50, 0.02 + 0.98 * left)


def _noised(x: Tensor, t: Tensor, schedule: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    a, s = schedule[t].sqrt().view(-1, 1, 1, 1), (1 - schedule[t]).sqrt().view(-1, 1, 1, 1)
    return a * x + s * noise, a * noise - s * x


@torch.no_grad()
def evaluate(
    networks: nn.ModuleDict, data: Data, schedule: Tensor, count: int = 512
) -> dict[str, float]:
    """Held-out v-loss, what the caption explains of it at middle timesteps, and attention's."""
    g = torch.Generator().manual_seed(3)
    x, masks = data.latents[0, :count].float(), data.masks[:count].float()
    t = ((torch.arange(count) + 0.5) / count * 1000).long()[torch.randperm(count, generator=g)]
    noisy, target = _noised(x, t, schedule, torch.randn(x.shape, generator=g))
    full = data.tokens(0)[0, :count]
    empty = data.words.encode([""]).expand(count, -1, -1)
    device, losses, attention = schedule.device, [], []
    for tokens in (full, empty):
        parts = []
        for part in torch.arange(count).split(64):
            maps: list[Tensor] = []
            there = noisy[part].to(device), t[part].to(device), tokens[part, :, 0].to(device)
            parts.append(velocity(networks, *there, maps).cpu())
            owners, where = tokens[part, :, 1].to(device), masks[part].to(device)
            attention.append(float(attention_loss(maps, owners, where)))
        losses.append((torch.cat(parts) - target).square().mean((1, 2, 3)))
    middle = (t >= 250) & (t < 700)
    return {
        "loss": float(losses[0].mean()),
        "caption_gain": float((losses[1] - losses[0])[middle].mean()),
        "attention": sum(attention[: len(attention) // 2]) / (len(attention) // 2),
    }


def _batches(count: int, batch: int, seed: int, epoch: int) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
    yield from order[: count // batch * batch].split(batch)


class BaseTrainer:
    """One stage of training: networks, their running average, optimisers, and their saved state."""

    def __init__(
        self, state_path: Path, config: BaseConfig, initial: nn.ModuleDict | None, device: str
    ) -> None:
        comfy_attention.optimized_attention = comfy_attention.attention_pytorch
        comfy_attention.optimized_attention_masked = comfy_attention.attention_pytorch
        self.state_path, self.config, self.device = state_path, config, device
        self.words = Words()
        torch.manual_seed(config.seed)
        self.networks = (initial or build_networks(self.words)).to(device)
        self.average = copy.deepcopy(self.networks).requires_grad_(False)
        self.networks.requires_grad_(True)
        self.networks["text"].text_projection.requires_grad_(False)
        self.schedule = alphas_cumprod(build_unet().model_sampling).to(device)
        self.muon, self.adam, self.by_adam = self._optimisers()
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        if state_path.exists():
            self._restore()
        self.started = time.time() - self.seconds

    def _optimisers(self) -> tuple[Muon, torch.optim.AdamW, list[Tensor]]:
        not_for_muon = (
            "unet.input_blocks.0.",
            "unet.out.",
            "unet.time_embed",
            "text.text_model.embeddings",
        )
        matrices, rest = split_parameters(self.networks.named_parameters(), not_for_muon)
        text: Any = self.networks["text"]
        embeddings = {id(p) for p in text.text_model.embeddings.parameters()}
        groups = [
            {"params": [p for p in rest if id(p) not in embeddings], "scale": 1.0},
            {"params": [p for p in rest if id(p) in embeddings], "scale": 3.0},
        ]
        muon = Muon(matrices, lr=self.config.matrix_rate)
        adam = torch.optim.AdamW(
            groups, lr=self.config.other_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        return muon, adam, rest

    def _restore(self) -> None:
        saved = torch.load(self.state_path, weights_only=False, map_location=self.device)
        old, new, step = saved["config"], self.config, saved["step"]
        started_alike = replace(old, steps=new.steps) == new
        if not started_alike or (old != new and step > min(new.decay_start, old.decay_start)):
            raise SystemExit(
                f"{self.state_path} was made with {old}, not {new}; delete it to start anew"
            )
        for name in ("networks", "average", "muon", "adam"):
            getattr(self, name).load_state_dict(saved[name])
        self.step, self.history, self.seconds = step, saved["history"], saved["seconds"]

    def save(self) -> None:
        """Everything that going on needs, atomically."""
        state: dict[str, object] = {
            name: getattr(self, name).state_dict()
            for name in ("networks", "average", "muon", "adam")
        }
        state.update(
            config=self.config,
            step=self.step,
            history=self.history,
            seconds=time.time() - self.started,
        )
        save_atomically(state, self.state_path)

    def learn(self, data: Data, tokens: Tensor, index: Tensor) -> float:
        """One step on the pictures at ``index``; returns its loss."""
        config = self.config
        g = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        mirrored = (torch.rand(config.batch, generator=g) < 0.5).long()
        x, said = data.latents[mirrored, index].float(), tokens[mirrored, index]
        masks = data.masks[index].float()
        masks = torch.where(mirrored.view(-1, 1, 1, 1) > 0, masks.flip(-1), masks)
        nothing = torch.rand(config.batch, 1, 1, generator=g) < config.empty_share
        said = torch.where(nothing, data.words.encode([""]), said)
        full_length = self.step >= config.steps * (1 - config.full_length_share)
        if not full_length and float(torch.rand(1, generator=g)) < config.short_share:
            said = said[:, :SHORT]
        # The first part sees all noise levels of the schedule, the rest only those in use.
        levels = len(self.schedule) if self.step < config.wide_until else config.timesteps
        strata = (torch.arange(config.batch) + torch.rand(1, generator=g)) / config.batch
        t = (strata * levels).long().clamp(max=levels - 1)
        noise = torch.randn(x.shape, generator=g)
        x, said, masks, t, noise = (a.to(self.device) for a in (x, said, masks, t, noise))
        noisy, target = _noised(x, t, self.schedule, noise)
        self._set_rates()
        weight = 1 + config.thing_weight * masks.amax(1, keepdim=True)
        weight = weight / (1 + 0.2 * config.thing_weight)
        maps: list[Tensor] | None = [] if config.attention_weight else None
        found = velocity(self.networks, noisy, t, said[..., 0], maps)
        loss = ((found - target).square() * weight).mean()
        total = loss
        if maps is not None:
            total = loss + config.attention_weight * attention_loss(maps, said[..., 1], masks)
        self.muon.zero_grad(set_to_none=True)
        self.adam.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.by_adam, 1.0)
        self.muon.step()
        self.adam.step()
        keep = 1 - min(config.averaging, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            pairs = zip(self.average.parameters(), self.networks.parameters(), strict=True)
            for old, new in pairs:
                old.lerp_(new, keep)
        self.step += 1
        return loss.item()

    def _set_rates(self) -> None:
        factor = self.config.rate(self.step)
        for group in self.adam.param_groups:
            group["lr"] = self.config.other_rate * factor * group["scale"]
        for group in self.muon.param_groups:
            group["lr"] = self.config.matrix_rate * factor

    def run(self, data: Data, held_out: Data) -> None:
        """Train to the end of the configuration's steps, reporting and saving on the way."""
        config, count, running = self.config, data.latents.shape[1], 0.0
        per_epoch = count // config.batch
        while self.step < config.steps:
            epoch, first = divmod(self.step, per_epoch)
            tokens = data.tokens(epoch)
            for number, index in enumerate(_batches(count, config.batch, config.seed, epoch)):
                if number < first or self.step >= config.steps:
                    continue
                loss = self.learn(data, tokens, index)
                running = loss if not running else 0.98 * running + 0.02 * loss
                seconds = time.time() - self.started
                if self.step % 50 == 0:
                    log.info(
                        "base %d/%d  loss %.4f  %.0f s", self.step, config.steps, running, seconds
                    )
                if self.step % 250 == 0 or self.step == config.steps:
                    figures = evaluate(self.average, held_out, self.schedule)
                    self.history.append(
                        {"step": self.step, "seconds": round(seconds), "train": running, **figures}
                    )
                    log.info("held out: %s", self.history[-1])
                    self.save()


def train_base(
    cache: Path, autoencoder: SmallAutoencoder, stages: dict[str, BaseConfig], device: str = "cpu"
) -> tuple[nn.ModuleDict, Words, dict[str, list[dict[str, float]]]]:
    """All stages, each from the average the one before ended with; what was done is not redone.

    Returns the averaged networks, their words and the history of every stage.
    """
    networks: nn.ModuleDict | None = None
    history: dict[str, list[dict[str, float]]] = {}
    for name, config in stages.items():
        trainer = BaseTrainer(cache / f"{name}_state.pt", config, networks, device)
        if trainer.step < config.steps:
            chunks = range(config.first_chunk, config.first_chunk + config.chunks)
            data = load_data(cache, autoencoder, trainer.words, chunks, config.place_first)
            held_out = load_data(cache, autoencoder, trainer.words, range(-1, 0))
            trainer.run(data, held_out)
        networks, history[name] = trainer.average, trainer.history
    if networks is None:
        raise ValueError("no stage of training was given; expected at least one")
    return networks.cpu(), Words(), history
