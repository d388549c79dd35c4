"""Training of the judge, on renderings and on renderings that went through the autoencoder.

Never on generated pictures. A third of the pictures pass the autoencoder, so that its small faults
are not mistaken for properties of the thing.
"""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from comfyui_perfusion.demo.model.small_autoencoder import SmallAutoencoder
from torch import Tensor

from .classes import CLASS_NAMES
from .judge import HEADS, OF_COLOR, Judge
from .muon import Muon, split_parameters
from .pool import chunk_specs, load_chunk, save_atomically
from .render import render_indices
from .specs import LOOK, STYLES, Specs
from .things import photo_specs
from .train_encoder import to_input

log = logging.getLogger("demo.train")
PAIRS = 8192
HELD_OUT = 64
"""Pairs of each kind that training does not see."""


@dataclass(frozen=True)
class JudgeConfig:
    """What determines the judge's weights: recorded beside them."""

    steps: int = 1600
    batch: int = 64
    chunks: int = 12
    first_chunk: int = 500
    seed: int = 0


def pair_specs(count: int, seed: int, kinds: Tensor) -> tuple[Specs, Specs]:
    """The same random things twice, of the given kinds, on different photographs."""
    first, second = photo_specs(count, seed), photo_specs(count, seed + 500)
    first.kind[:, 0] = kinds
    for name in LOOK:
        getattr(second, name)[:, 0] = getattr(first, name)[:, 0]
    return first, second


def targets(specs: Specs) -> dict[str, Tensor]:
    """What each head should say; "kind" as yes/no (n, 8), attributes of the first thing."""
    kind = F.one_hot(specs.kind[:, 0], len(CLASS_NAMES)).float()
    second = F.one_hot(specs.kind[:, 1], len(CLASS_NAMES)).float()
    out = {"kind": torch.where(specs.two[:, None], torch.maximum(kind, second), kind)}
    for name in HEADS:
        if name != "kind":
            value = getattr(specs, name)
            out[name] = (value if value.dim() == 1 else value[:, 0]).long()
    return out


def readable(specs: Specs, name: str) -> Tensor:
    """Which pictures (n,) show attribute ``name`` at all."""
    if name in ("scene", "style"):
        return torch.ones(len(specs), dtype=torch.bool)
    single = ~specs.two
    return single & (specs.style == STYLES.index("photo")) if name in OF_COLOR else single


def _attribute_loss(logits: dict[str, Tensor], specs: Specs) -> Tensor:
    device = logits["kind"].device
    wanted = targets(specs)
    loss = 4 * F.binary_cross_entropy_with_logits(logits["kind"], wanted["kind"].to(device))
    for name in HEADS:
        rows = readable(specs, name)
        if name != "kind" and bool(rows.any()):
            found = logits[name][rows.to(device)]
            loss = loss + 0.5 * F.cross_entropy(found, wanted[name][rows].to(device))
    return loss


@torch.no_grad()
def accuracies(judge: Judge, pictures: Tensor, specs: Specs) -> dict[str, float]:
    """Share of right readings, pictures in [-1, 1]; attributes where they can be seen."""
    logits = judge.read(torch.cat([judge.features(x) for x in pictures.split(256)]))
    wanted = targets(specs)
    single = ~specs.two
    out = {"kind": float((logits["kind"].argmax(1) == specs.kind[:, 0])[single].float().mean())}
    top = logits["kind"].topk(2, 1).indices.sort(1).values
    both = specs.kind.sort(1).values
    different = specs.two & (specs.kind[:, 0] != specs.kind[:, 1])
    out["both_kinds"] = float((top == both).all(1)[different].float().mean())
    for name in HEADS:
        if name != "kind":
            right = (logits[name].argmax(1) == wanted[name])[readable(specs, name)]
            out[name] = float(right.float().mean())
    return {name: round(value, 4) for name, value in out.items()}


def _pairs(device: str) -> tuple[Tensor, Tensor]:
    first, second = pair_specs(PAIRS, 4_000_000, torch.arange(PAIRS) % len(CLASS_NAMES))
    sides = [
        torch.cat(
            [render_indices(side.take(slice(i, i + 512)), device)[0] for i in range(0, PAIRS, 512)]
        )
        for side in (first, second)
    ]
    return sides[0], sides[1]


def train_judge(
    cache: Path, autoencoder: SmallAutoencoder, config: JudgeConfig, device: str = "cpu"
) -> tuple[Judge, dict[str, dict[str, float]]]:
    """The judge and its accuracy on held-out renderings, plain and through the autoencoder."""
    done = cache / "judge.pt"
    judge = Judge()
    if done.exists():
        saved = torch.load(done, map_location="cpu")
        judge.load_state_dict(saved["judge"])
        return judge.train(False).requires_grad_(False), saved["report"]
    torch.manual_seed(config.seed)
    judge = Judge().to(device)
    judge.to(memory_format=torch.channels_last)  # pyright: ignore
    autoencoder = autoencoder.to(device)
    scale = torch.nn.Parameter(torch.tensor(2.3, device=device))
    matrices, rest = split_parameters(judge.named_parameters(), ("heads.",))
    optimisers = [
        (Muon(matrices, lr=0.02), 0.02),
        (torch.optim.AdamW([*rest, scale], lr=2e-3, weight_decay=0.01), 2e-3),
    ]
    average = {k: v.clone() for k, v in judge.state_dict().items()}
    indices = range(config.first_chunk, config.first_chunk + config.chunks)
    # A judge that knew what is usual would read it where nothing is to be seen.
    pool = [(load_chunk(i, device, 1.0)[0], chunk_specs(i, 1.0)) for i in indices]
    first, second = _pairs(device)
    kinds = torch.arange(PAIRS) % len(CLASS_NAMES)
    by_kind = [(kinds == k).nonzero()[:, 0][:-HELD_OUT] for k in range(len(CLASS_NAMES))]
    started = time.time()
    for step in range(config.steps):
        g = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        pictures, specs = pool[int(torch.randint(config.chunks, (1,), generator=g))]
        rows = torch.randint(len(pictures), (config.batch,), generator=g)
        two_kinds = torch.randperm(len(by_kind), generator=g)[:2].tolist()
        pairs = torch.cat(
            [
                by_kind[k][torch.randperm(len(by_kind[k]), generator=g)[: config.batch // 4]]
                for k in two_kinds
            ]
        )
        there = pairs.to(device)
        x = to_input(torch.cat([pictures[rows.to(device)], first[there], second[there]]))
        through = (torch.rand(len(x), generator=g) < 0.33).to(device)
        grain = torch.rand(len(x), 1, 1, 1, generator=g).to(device) * 0.08
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                z = autoencoder.encode(x[through]).float()
                z = z + 0.25 * torch.randn(z.shape, generator=g).to(device)
                x[through] = autoencoder.decode(z).float()
                x = x + torch.randn(x.shape, generator=g).to(device) * grain
            features = judge.features(x)
            logits = judge.read(features[: config.batch])
            vectors = judge.embed(features[config.batch :]).float()
        loss = _attribute_loss({k: v.float() for k, v in logits.items()}, specs.take(rows))
        alike = vectors[: len(pairs)] @ vectors[len(pairs) :].T * scale.exp().clamp(max=50)
        wanted = torch.arange(len(pairs), device=device)
        loss = loss + (F.cross_entropy(alike, wanted) + F.cross_entropy(alike.T, wanted)) / 2
        for optimiser, rate in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = (
                    rate
                    * min(1, (step + 1) / 50)
                    * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))
                )
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for optimiser, _ in optimisers:
            optimiser.step()
        keep = 1 - min(0.99, (1 + step) / (10 + step))
        for name, value in judge.state_dict().items():
            average[name].lerp_(value, keep)
        if (step + 1) % 50 == 0:
            log.info(
                "judge %d/%d  loss %.3f  %.0f s",
                step + 1,
                config.steps,
                loss.item(),
                time.time() - started,
            )
    judge.load_state_dict(average)
    judge = judge.to("cpu", memory_format=torch.contiguous_format)  # pyright: ignore
    judge.train(False).requires_grad_(False)
    autoencoder = autoencoder.to("cpu")
    pictures, specs = load_chunk(-1)[0][:2048], chunk_specs(-1).take(slice(0, 2048))
    plain = to_input(pictures)
    with torch.no_grad():
        coded = torch.cat([autoencoder.decode(autoencoder.encode(x)) for x in plain.split(128)])
    report = {
        "renderings": accuracies(judge, plain, specs),
        "through_autoencoder": accuracies(judge, coded, specs),
    }
    found = _retrieval(judge, first.cpu(), second.cpu(), kinds)
    report["renderings"]["instance_retrieval_of_64"] = round(found, 3)
    log.info("judge: %s", report)
    save_atomically({"judge": judge.state_dict(), "report": report}, done)
    return judge, report


@torch.no_grad()
def _retrieval(judge: Judge, first: Tensor, second: Tensor, kinds: Tensor) -> float:
    """How often the same thing is found among 64 held-out things of its kind."""
    hits = []
    for k in range(len(CLASS_NAMES)):
        rows = (kinds == k).nonzero()[:, 0][-HELD_OUT:]
        a, b = (judge.embed(judge.features(to_input(side[rows]))) for side in (first, second))
        hits.append(((a @ b.T).argmax(1) == torch.arange(HELD_OUT)).float().mean())
    return float(torch.stack(hits).mean())
