"""Training of the small world's text-to-image model: text encoder and UNet together."""

import copy
import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as comfy_attention
import torch
from comfyui_perfusion.demo.model.small_autoencoder import SmallAutoencoder
from comfyui_perfusion.demo.model.small_model import CHANNELS, TIMESTEPS, build_unet
from torch import Tensor, nn

from .attention_maps import attention_loss
from .base_data import SHORT, Data, Said, Speaker, load_data, say
from .captions import NOUN
from .muon import Muon, split_parameters
from .networks import (
    Words,
    alphas_cumprod,
    build_networks,
    embed_words,
    encode_text,
    plain_attention,
    velocity,
)
from .pool import CHUNK, save_atomically
from .train_state import forget_drawn, taken_up

log = logging.getLogger("demo.train")


@dataclass(frozen=True)
class BaseConfig:
    """What determines the weights (with the autoencoder): recorded beside them."""

    steps: int = 89500
    minutes: float = 0.0
    batch: int = 64
    window: int = 12
    seed: int = 0
    channels: int = CHANNELS
    matrix_rate: float = 0.012
    other_rate: float = 1e-3
    averaging: float = 0.999
    thing_weight: float = 2.0
    empty_share: float = 0.1
    short_share: float = 0.8
    decay_share: float = 0.4
    full_length_share: float = 0.08
    timesteps: int = TIMESTEPS
    attention_weight: float = 0.25
    named_share: float = 0.15
    values_share: float = 0.8
    report_every: int = 500

    def progress(self, step: int, seconds: float) -> float:
        """How much of the training is done: by time where ``minutes`` are given, else by steps."""
        return seconds / (60 * self.minutes) if self.minutes else step / self.steps

    def rate(self, step: int, progress: float) -> float:
        """Share of the full learning rate: falls in a line to 2 % in the last ``decay_share``."""
        left = max(0.0, 1 - progress) / self.decay_share
        return min(1.0, (step + 1) / 50, 0.02 + 0.98 * left)

    def chunks(self, epoch: int) -> range:
        """The pictures of an epoch: each one a quarter of them are new."""
        fresh = max(1, self.window // 4)
        return range(epoch * fresh, epoch * fresh + self.window)


def noised(x: Tensor, t: Tensor, schedule: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    a, s = schedule[t].sqrt().view(-1, 1, 1, 1), (1 - schedule[t]).sqrt().view(-1, 1, 1, 1)
    return a * x + s * noise, a * noise - s * x


def contexts(
    networks: nn.ModuleDict,
    rows: Tensor,
    owners: Tensor,
    looks: Tensor,
    named: Tensor,
    by_values: Tensor,
) -> tuple[Tensor, Tensor]:
    """Encodings (n, tokens, 128) that keys and values come from.

    Where a thing is ``named`` (n, 2), the vector of its noun is the name of its look (n, 2, 6). In
    most of these captions, ``by_values`` (n,), all else reads as if the plain noun stood there: the
    name is told by the values at its own place alone, which is where a concept will speak.
    """
    words = embed_words(networks["text"], rows)
    plain = encode_text(networks["text"], words)
    at = torch.stack([(owners == NOUN + p) & named[:, p, None] for p in range(2)], -1)  # n t 2
    some = at.any(-1).any(-1).nonzero()[:, 0]
    if not len(some):
        return plain, plain
    names = networks["names"](looks[some].flatten(0, 1)).unflatten(0, (-1, 2))  # m 2 128
    swapped = words[some]
    for place in range(2):
        here = at[some, :, place, None]
        swapped = torch.where(here, names[:, place, None].to(swapped), swapped)
    full = plain.index_copy(0, some, encode_text(networks["text"], swapped).to(plain))
    everywhere = ~by_values[:, None, None]
    keys = torch.where(everywhere, full, plain)
    return keys, torch.where(everywhere | at.any(-1, keepdim=True), full, plain)


@torch.no_grad()
def evaluate(
    networks: nn.ModuleDict, data: Data, schedule: Tensor, count: int = 256
) -> dict[str, float]:
    """Held-out v-loss, what the caption explains of it at middle timesteps, and attention's.

    "names" is the loss where things are called by their names, by values alone.
    """
    g = torch.Generator().manual_seed(3)
    device = schedule.device
    x, masks = data.latents[0, :count].float().cpu(), data.masks[:count].float().cpu()
    t = ((torch.arange(count) + 0.5) / count * TIMESTEPS).long()
    t = t[torch.randperm(count, generator=g)]
    noisy, target = noised(x, t, schedule.cpu(), torch.randn(x.shape, generator=g))
    everyone, nobody = torch.ones(count, 2).bool(), torch.zeros(count, 2).bool()
    plain, proper = (say(data.words, -1, 0, share) for share in (0.0, 1.0))
    empty = data.words.empty[:, :SHORT].expand(count, -1, -1)
    losses, attention = [], []
    for said, named in (
        (plain.tokens[0], plain.named),
        (empty, nobody),
        (proper.tokens[0], everyone),
    ):
        tokens = said[:count].long()
        parts = []
        for part in torch.arange(count).split(128):
            maps: list[Tensor] = []
            rows, owners = tokens[part, :, 0].to(device), tokens[part, :, 1].to(device)
            with torch.autocast(device.type, torch.bfloat16):
                both = contexts(
                    networks,
                    rows,
                    owners,
                    data.looks[part.to(device)],
                    named[part].to(device),
                    everyone[part, 0].to(device),
                )
                found = velocity(networks, noisy[part].to(device), t[part].to(device), both, maps)
            parts.append(found.float().cpu())
            told = attention_loss([m.float() for m in maps], owners, masks[part].to(device))
            attention.append(float(told))
        losses.append((torch.cat(parts) - target).square().mean((1, 2, 3)))
    middle = (t >= 250) & (t < 700)
    return {
        "loss": float(losses[0].mean()),
        "caption_gain": float((losses[1] - losses[0])[middle].mean()),
        "names": float(losses[2].mean()),
        "attention": sum(attention[: len(attention) // 3]) / (len(attention) // 3),
    }


def _batches(count: int, batch: int, seed: int, epoch: int) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
    yield from order[: count // batch * batch].split(batch)


class BaseTrainer:
    """Networks, their running average, optimisers, and their saved state."""

    def __init__(self, state_path: Path, config: BaseConfig, device: str) -> None:
        comfy_attention.optimized_attention = plain_attention
        comfy_attention.optimized_attention_masked = plain_attention
        self.state_path, self.config, self.device = state_path, config, device
        self.words = Words()
        torch.manual_seed(config.seed)
        self.networks = build_networks(self.words, config.channels).to(device)
        self.average = copy.deepcopy(self.networks).requires_grad_(False)
        self.schedule = alphas_cumprod(build_unet().model_sampling).to(device)
        self.muon, self.adam, self.by_adam = self._optimisers()
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        if state_path.exists():
            self._restore()
        else:
            self._take_up()
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

    def _take_up(self) -> None:
        begun = taken_up("base")
        if begun:
            groups, about = begun
            self.networks.load_state_dict(groups["average"])
            self.average.load_state_dict(groups["average"])
            self.step, self.seconds = about["step"], about["seconds"]
            self.history = about["history"]

    def _restore(self) -> None:
        saved = torch.load(self.state_path, map_location=self.device)
        old, new, step = BaseConfig(**saved["config"]), self.config, saved["step"]
        if replace(old, steps=new.steps, minutes=new.minutes) != new:
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
            config=asdict(self.config),
            step=self.step,
            history=self.history,
            seconds=time.time() - self.started,
        )
        save_atomically(state, self.state_path)

    @property
    def progress(self) -> float:
        """How much of the training is done, 1 at its end."""
        return self.config.progress(self.step, time.time() - self.started)

    def learn(self, data: Data, said: Said, index: Tensor) -> Tensor:
        """One step on the pictures at ``index``; returns its loss."""
        config, device, n = self.config, self.device, self.config.batch
        seed = config.seed * 1_000_003 + self.step
        g = torch.Generator(device).manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=g, device=device)

        index = index.to(device)
        mirrored = (uniform(n) < 0.5).long()
        x, masks = data.latents[mirrored, index].float(), data.masks[index].float()
        masks = torch.where(mirrored.view(-1, 1, 1, 1) > 0, masks.flip(-1), masks)
        tokens = said.tokens[mirrored, index].long()
        nothing = uniform(n, 1, 1) < config.empty_share
        tokens = torch.where(nothing, data.words.empty[:, : tokens.shape[1]].to(device), tokens)
        full_length = self.progress >= 1 - config.full_length_share
        if full_length or random.Random(seed).random() >= config.short_share:
            rest = data.words.empty[:, SHORT:].to(device).expand(n, -1, -1)
            tokens = torch.cat([tokens, rest], 1)
        by_values = uniform(n) < config.values_share
        strata = (torch.arange(n, device=device) + uniform(1)) / n
        t = (strata * config.timesteps).long().clamp(max=config.timesteps - 1)
        noise = torch.randn(x.shape, generator=g, device=device)
        noisy, target = noised(x, t, self.schedule, noise)
        self._set_rates()
        weight = 1 + config.thing_weight * masks.amax(1, keepdim=True)
        weight = weight / (1 + 0.2 * config.thing_weight)
        maps: list[Tensor] = []
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            both = contexts(
                self.networks,
                tokens[..., 0],
                tokens[..., 1],
                data.looks[index],
                said.named[index],
                by_values,
            )
            found = velocity(self.networks, noisy, t, both, maps).float()
        loss = ((found - target).square() * weight).mean()
        told = attention_loss([m.float() for m in maps], tokens[..., 1], masks)
        self.muon.zero_grad(set_to_none=True)
        self.adam.zero_grad(set_to_none=True)
        (loss + config.attention_weight * told).backward()
        nn.utils.clip_grad_norm_(self.by_adam, 1.0)
        self.muon.step()
        self.adam.step()
        keep = 1 - min(config.averaging, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(  # pyright: ignore
                list(self.average.parameters()), list(self.networks.parameters()), keep
            )
        self.step += 1
        return loss.detach()

    def _set_rates(self) -> None:
        factor = self.config.rate(self.step, self.progress)
        for group in self.adam.param_groups:
            group["lr"] = self.config.other_rate * factor * group["scale"]
        for group in self.muon.param_groups:
            group["lr"] = self.config.matrix_rate * factor

    def run(self, cache: Path, autoencoder: SmallAutoencoder, until: float, apart: bool) -> bool:
        """Train to the end, or till the time ``until``; captions in processes ``apart`` or not.

        Reports and saves on the way; says whether the end was reached.
        """
        config, running = self.config, None
        forget_drawn(cache)
        per_epoch = config.window * CHUNK // config.batch
        held_out = load_data(cache, autoencoder, self.words, range(-1, 0), self.device)
        speaker = Speaker(self.words, config.named_share, self.device, apart)
        while self.progress < 1:
            epoch, first = divmod(self.step, per_epoch)
            said = speaker.say(config.chunks(epoch), epoch)
            data = load_data(cache, autoencoder, self.words, config.chunks(epoch), self.device)
            speaker.prepare(config.chunks(epoch + 1), epoch + 1)
            log.info("epoch %d begins or goes on at step %d", epoch, self.step)
            batches = _batches(config.window * CHUNK, config.batch, config.seed, epoch)
            for number, index in enumerate(batches):
                if number < first:
                    continue
                loss = self.learn(data, said, index)
                running = loss if running is None else running.lerp(loss, 0.02)
                seconds = time.time() - self.started
                if self.step % 50 == 0:
                    log.info(
                        "base %d (%.1f %%)  loss %.4f  %.0f s",
                        self.step,
                        100 * self.progress,
                        float(running),
                        seconds,
                    )
                done, late = self.progress >= 1, time.time() > until
                if self.step % config.report_every == 0 or done or late:
                    figures = evaluate(self.average, held_out, self.schedule)
                    figures["train"] = float(running)
                    self.history.append({"step": self.step, "seconds": round(seconds), **figures})
                    log.info("held out: %s", self.history[-1])
                    self.save()
                if done or late:
                    return done
        return True


def train_base(
    cache: Path,
    autoencoder: SmallAutoencoder,
    config: BaseConfig,
    device: str = "cpu",
    until: float = math.inf,
    apart: bool = False,
) -> BaseTrainer | None:
    """Train, or go on where a stopped run was; None where the time ``until`` came first."""
    trainer = BaseTrainer(cache / "base_state.pt", config, device)
    done = trainer.progress >= 1 or trainer.run(cache, autoencoder.to(device), until, apart)
    return trainer if done else None
