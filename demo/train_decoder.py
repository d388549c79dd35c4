"""Training of the small world's decoder, on encodings and on what the trained model draws."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from comfyui_perfusion.demo.model.small_autoencoder import SmallAutoencoder, color_prior
from torch import Tensor, nn

from .muon import Muon, split_parameters
from .pool import save_atomically
from .redraw import Drawn, drawn_chunk
from .render import to_rgb
from .train_encoder import make_encoder, psnr, to_input
from .train_state import taken_up

log = logging.getLogger("demo.train")
HELD_OUT = 512


@dataclass(frozen=True)
class DecoderConfig:
    """What determines the decoder's weights, with those of the model that draws."""

    steps: int = 46000
    batch: int = 64
    chunks: int = 7
    first_chunk: int = 120
    seed: int = 0
    noise: float = 0.6
    encoded_share: float = 0.25
    shifted_share: float = 0.3
    pixels: int = 512
    prior_pixels: int = 384


class _Trainer:
    def __init__(self, cache: Path, config: DecoderConfig, device: str) -> None:
        self.config, self.device = config, device
        self.state_path = cache / "decoder_state.pt"
        model = make_encoder(cache, config.seed, device)
        model.decoder.requires_grad_(True)
        model.voter.requires_grad_(True)
        self.model = model.to(device, memory_format=torch.channels_last)
        matrices, rest = split_parameters(model.named_parameters(), ("voter",))
        self.optimisers = [
            (Muon(matrices, lr=0.01), 0.01),
            (torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0), 2e-3),
        ]
        self.rest = rest
        self.average = {k: v.clone() for k, v in model.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        begun = taken_up("decoder")
        if not self.state_path.exists() and begun:
            groups, about = begun
            model.load_state_dict(groups["average"])
            self.average = {k: v.to(device) for k, v in groups["average"].items()}
            self.step, self.seconds = about["step"], about["seconds"]
        if self.state_path.exists():
            saved = torch.load(self.state_path, map_location=device)
            model.load_state_dict(saved["model"])
            self.average, self.step = saved["average"], saved["step"]
            self.seconds = saved["seconds"]
            for (optimiser, _), old in zip(self.optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(old)

    def save(self, seconds: float) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": seconds,
            "optimisers": [o.state_dict() for o, _ in self.optimisers],
        }
        save_atomically(state, self.state_path)

    def _latents(self, wanted: Tensor, drawn: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures and latents to learn from: some encoded, the others as the model drew them."""
        config, n = self.config, round(self.config.encoded_share * len(wanted))
        encoded = wanted[:n]
        if float(torch.rand(1, generator=g)) < config.shifted_share:
            dy, dx = (int(k) for k in torch.randint(-6, 7, (2,), generator=g))
            encoded = encoded.roll((dy, dx), (1, 2))
        x = to_input(encoded)
        grain = torch.rand(n, 1, 1, 1, generator=g) * 0.06
        x = x + (torch.randn(x.shape, generator=g) * grain).to(self.device)
        z = torch.cat([self.model.encode(x), drawn[n:].float()])
        amount = torch.rand(len(z), 1, 1, 1, generator=g).square() * config.noise
        z = z + (torch.randn(z.shape, generator=g) * amount).to(self.device)
        return torch.cat([encoded, wanted[n:]]), z

    def learn(self, drawn: Drawn) -> Tensor:
        """One step; returns the share of pixels whose colour was wrong."""
        config = self.config
        g = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        rows = torch.randint(len(drawn.pictures), (config.batch,), generator=g).to(self.device)
        with torch.no_grad():
            wanted, z = self._latents(drawn.pictures[rows], drawn.latents[rows], g)
        n, masks = len(wanted), drawn.masks[rows]
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            features = self.model.features(z.contiguous(memory_format=torch.channels_last))
            features = features.permute(0, 2, 3, 1).reshape(n, 64 * 64, -1)
            # Some of the pixels are enough, and a third of the cost: at first those of things.
            background = max(0.15, self.step / config.steps)
            things = F.interpolate((masks.float().amax(1, keepdim=True) > 0).float(), (64, 64))
            odds = torch.rand(n, 64 * 64, generator=g).to(self.device) * (
                background + (1 - background) * things.flatten(1)
            )
            where = odds.topk(config.pixels, 1, sorted=False).indices
            chosen = features.gather(1, where[..., None].expand(-1, -1, features.shape[-1]))
            votes = self.model.voter(chosen).float()
            with torch.no_grad():  # what the whole picture says, from pixels of all of it
                anywhere = torch.randperm(64 * 64, generator=g)[: config.prior_pixels]
                prior = color_prior(self.model.voter(features[:, anywhere.to(self.device)]).float())
        votes = votes + prior
        right = wanted.flatten(1).gather(1, where).long()
        loss = F.cross_entropy(votes.flatten(0, 1), right.flatten())
        for optimiser, rate in self.optimisers:
            left = (config.steps - self.step) / (0.5 * config.steps)
            factor = min(1.0, (self.step + 1) / 50, 0.02 + 0.98 * left)
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        for optimiser, _ in self.optimisers:
            optimiser.step()
        self.step += 1
        keep = 1 - min(0.995, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, keep)
        return (votes.detach().argmax(-1) != right).float().mean()


@torch.no_grad()
def wrong_pixels(model: SmallAutoencoder, drawn: Drawn, latents: Tensor) -> float:
    """Share of pixels of ``drawn`` whose colour the decoder gets wrong from ``latents``."""
    wrong = [
        model.votes(z.float()).argmax(-1) != pictures
        for z, pictures in zip(latents.split(64), drawn.pictures.split(64), strict=True)
    ]
    return float(torch.cat(wrong).float().mean())


def held_out_figures(model: SmallAutoencoder, drawn: Drawn) -> dict[str, float]:
    """What the decoder makes of held-out pictures, encoded and as the model draws them."""
    encoded = torch.cat([model.encode(to_input(x)) for x in drawn.pictures.split(64)])
    return {
        "held_out_psnr_db": round(psnr(model, to_rgb(drawn.pictures)), 2),
        "wrong_pixels_encoded": round(wrong_pixels(model, drawn, encoded), 4),
        "wrong_pixels_drawn": round(wrong_pixels(model, drawn, drawn.latents), 4),
    }


def train_decoder(
    cache: Path,
    networks: nn.ModuleDict,
    schedule: Tensor,
    config: DecoderConfig,
    device: str,
    until: float = math.inf,
) -> tuple[SmallAutoencoder, dict[str, float]] | None:
    """Learn to name each pixel's colour; resumes from ``cache``; returns the averaged weights.

    ``networks`` and ``schedule`` are the trained model, whose drawings are most of the examples;
    noise on the latents makes the decoder snap to clean shapes. With the weights comes what
    ``held_out_figures`` says of them. Returns None where ``until`` (as ``time.time``) came first.
    """
    done = cache / "autoencoder.pt"
    if done.exists():
        saved = torch.load(done, map_location="cpu")
        model = SmallAutoencoder().requires_grad_(False)
        model.load_state_dict(saved["model"])
        return model, saved["figures"]
    trainer = _Trainer(cache, config, device)
    encoder = make_encoder(cache, config.seed, device).to(device)
    held_out = drawn_chunk(cache, networks, schedule, encoder, -1, device, HELD_OUT)
    pool = []
    for chunk in range(config.first_chunk, config.first_chunk + config.chunks):
        pool.append(drawn_chunk(cache, networks, schedule, encoder, chunk, device))
        log.info("drawn: chunk %d, %d pictures are the same", chunk, len(pool[-1].pictures))
        if time.time() > until:
            return None
    started = time.time() - trainer.seconds
    running = torch.ones((), device=device)
    while trainer.step < config.steps:
        g = torch.Generator().manual_seed(config.seed * 7919 + trainer.step)
        drawn = pool[int(torch.randint(len(pool), (1,), generator=g))]
        running = running.lerp(trainer.learn(drawn), 0.02)
        if trainer.step % 50 == 0:
            log.info(
                "decoder %d/%d  wrong pixels %.2f %%  %.0f s",
                trainer.step,
                config.steps,
                100 * float(running),
                time.time() - started,
            )
        if time.time() > until or trainer.step % 250 == 0 or trainer.step == config.steps:
            trainer.save(time.time() - started)
        if time.time() > until:
            return None
    model = trainer.model.requires_grad_(False)
    model.load_state_dict(trainer.average)
    figures = held_out_figures(model, held_out)
    log.info("decoder done: %s", figures)
    model = model.to("cpu", memory_format=torch.contiguous_format)
    save_atomically({"model": model.state_dict(), "figures": figures}, done)
    return model, figures
