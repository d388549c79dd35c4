"""Training of the judge, on renderings and on renderings that went through the autoencoder.

Never on generated pictures. A third of the pictures pass the autoencoder, so that its slight blur
is not mistaken for a property of the thing.
"""

import logging
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from comfyui_perfusion.demo.model.small_autoencoder import SmallAutoencoder
from torch import Tensor

from .classes import CLASS_NAMES
from .judge import HEADS, Judge
from .muon import Muon, split_parameters
from .pool import chunk_specs, load_chunk, save_atomically
from .render import render
from .specs import STYLES, Specs
from .things import photo_specs
from .train_autoencoder import pictures_to_float

log = logging.getLogger("demo.train")
_LOOK = (
    "kind",
    "color",
    "main",
    "second",
    "third",
    "pattern",
    "pattern_parameters",
    "face",
    "horn",
    "emblem",
)
PAIRS = 6144


def pair_specs(count: int, seed: int, kinds: Tensor) -> tuple[Specs, Specs]:
    """The same random things twice, of the given kinds, on different photographs."""
    first, second = photo_specs(count, seed), photo_specs(count, seed + 500)
    first.kind[:, 0] = kinds
    for name in _LOOK:
        getattr(second, name)[:, 0] = getattr(first, name)[:, 0]
    return first, second


def _load_pairs(cache: Path) -> tuple[Tensor, Tensor]:
    path = cache / "pairs.pt"
    if not path.exists():
        first, second = pair_specs(PAIRS, 4_000_000, torch.arange(PAIRS) % len(CLASS_NAMES))
        sides = [
            torch.cat([render(side.take(slice(i, i + 256)))[0] for i in range(0, PAIRS, 256)])
            for side in (first, second)
        ]
        save_atomically(tuple(sides), path)
    return torch.load(path)


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


def _attribute_loss(logits: dict[str, Tensor], wanted: dict[str, Tensor], specs: Specs) -> Tensor:
    loss = 4 * F.binary_cross_entropy_with_logits(logits["kind"], wanted["kind"])
    readable = ~specs.two & (specs.style == STYLES.index("photo"))
    for name in HEADS:
        if name in ("scene", "style"):
            loss = loss + F.cross_entropy(logits[name], wanted[name])
        elif name != "kind" and bool(readable.any()):
            loss = loss + 0.5 * F.cross_entropy(logits[name][readable], wanted[name][readable])
    return loss


@torch.no_grad()
def accuracies(judge: Judge, pictures: Tensor, specs: Specs) -> dict[str, float]:
    """Share of right readings, pictures in [-1, 1]; attributes on single things in photographs."""
    logits = judge.read(torch.cat([judge.features(x) for x in pictures.split(256)]))
    wanted = targets(specs)
    single = ~specs.two
    readable = single & (specs.style == STYLES.index("photo"))
    out = {"kind": float((logits["kind"].argmax(1) == specs.kind[:, 0])[single].float().mean())}
    top = logits["kind"].topk(2, 1).indices.sort(1).values
    both = specs.kind.sort(1).values
    different = specs.two & (specs.kind[:, 0] != specs.kind[:, 1])
    out["both_kinds"] = float((top == both).all(1)[different].float().mean())
    for name in HEADS:
        if name != "kind":
            rows = torch.ones_like(single) if name in ("scene", "style") else readable
            out[name] = float((logits[name].argmax(1) == wanted[name])[rows].float().mean())
    return {name: round(value, 3) for name, value in out.items()}


def train_judge(
    cache: Path,
    autoencoder: SmallAutoencoder,
    steps: int,
    batch: int,
    first_chunk: int,
    chunks: int,
    seed: int,
) -> tuple[Judge, dict[str, dict[str, float]]]:
    """The judge and its accuracy on held-out renderings, plain and through the autoencoder."""
    torch.manual_seed(seed)
    judge = Judge()
    scale = torch.nn.Parameter(torch.tensor(2.3))
    matrices, rest = split_parameters(judge.named_parameters(), ("heads.",))
    optimisers = [
        (Muon(matrices, lr=0.02), 0.02),
        (torch.optim.AdamW([*rest, scale], lr=2e-3, weight_decay=0.01), 2e-3),
    ]
    indices = range(first_chunk, first_chunk + chunks)
    pool = [(load_chunk(cache, i)[0], chunk_specs(i)) for i in indices]
    first, second = _load_pairs(cache)
    kinds = torch.arange(PAIRS) % len(CLASS_NAMES)
    by_kind = [
        (kinds == k).nonzero()[:, 0][:-64] for k in range(len(CLASS_NAMES))
    ]  # the last 64 are held out
    started = time.time()
    for step in range(steps):
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pictures, specs = pool[int(torch.randint(chunks, (1,), generator=g))]
        rows = torch.randint(len(pictures), (batch,), generator=g)
        two_kinds = torch.randperm(len(by_kind), generator=g)[:2]
        pairs = torch.cat(
            [
                by_kind[k][torch.randperm(len(by_kind[k]), generator=g)[: batch // 4]]
                for k in two_kinds
            ]
        )
        x = pictures_to_float(torch.cat([pictures[rows], first[pairs], second[pairs]]))
        with torch.no_grad():
            through = torch.rand(len(x), generator=g) < 0.33
            x[through] = autoencoder.decode(autoencoder.encode(x[through])).clamp(-1, 1)
            x = (
                x
                + torch.randn(x.shape, generator=g)
                * torch.rand(len(x), 1, 1, 1, generator=g)
                * 0.08
            )
        features = judge.features(x)
        loss = _attribute_loss(
            judge.read(features[:batch]), targets(specs.take(rows)), specs.take(rows)
        )
        vectors = judge.embed(features[batch:])
        alike = vectors[: len(pairs)] @ vectors[len(pairs) :].T * scale.exp().clamp(max=50)
        wanted = torch.arange(len(pairs))
        loss = loss + (F.cross_entropy(alike, wanted) + F.cross_entropy(alike.T, wanted)) / 2
        for optimiser, rate in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = (
                    rate
                    * min(1, (step + 1) / 50)
                    * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
                )
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for optimiser, _ in optimisers:
            optimiser.step()
        if (step + 1) % 50 == 0:
            log.info(
                "judge %d/%d  loss %.3f  %.0f s",
                step + 1,
                steps,
                loss.item(),
                time.time() - started,
            )
    judge.train(False).requires_grad_(False)
    pictures, specs = load_chunk(cache, -1)[0][:2048], chunk_specs(-1).take(slice(0, 2048))
    plain = pictures_to_float(pictures)
    coded = torch.cat(
        [autoencoder.decode(autoencoder.encode(x)).clamp(-1, 1) for x in plain.split(128)]
    )
    report = {
        "renderings": accuracies(judge, plain, specs),
        "through_autoencoder": accuracies(judge, coded, specs),
    }
    report["renderings"]["instance_retrieval_of_64"] = round(
        _retrieval(judge, first, second, kinds), 3
    )
    log.info("judge: %s", report)
    return judge, report


@torch.no_grad()
def _retrieval(judge: Judge, first: Tensor, second: Tensor, kinds: Tensor) -> float:
    """How often the same thing is found among 64 held-out things of its kind."""
    hits = []
    for k in range(len(CLASS_NAMES)):
        rows = (kinds == k).nonzero()[:, 0][-64:]
        a, b = (
            judge.embed(judge.features(pictures_to_float(side[rows]))) for side in (first, second)
        )
        hits.append(((a @ b.T).argmax(1) == torch.arange(64)).float().mean())
    return float(torch.stack(hits).mean())
