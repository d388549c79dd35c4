"""How well the base model learned its captions, as the judge reads its pictures."""

from typing import Any

import torch
from torch import Tensor

from .captions import PATTERN_WORDS, SIZE_WORDS, captions
from .fidelity import half, to_judge
from .generate import generate
from .judge import Judge
from .render import render
from .specs import COLOR_NAMES, SCENES, STYLES, UNNAMED_COLOR, Specs, sample_specs
from .sprites import PATTERNS

_SCENE_HINTS = (
    "beach",
    "sea",
    "snow",
    "snowy",
    "forest",
    "woods",
    "desert",
    "dune",
    "city",
    "street",
    "space",
)


def _share(right: Tensor, rows: Tensor) -> float:
    return round(float(right[rows].float().mean()), 3)


def _says(texts: list[str], words: list[tuple[str, ...]]) -> Tensor:
    """Whether each caption has one of its words."""
    pairs = zip(texts, words, strict=True)
    return torch.tensor([bool(set(t.replace(",", " ").split()) & set(w)) for t, w in pairs])


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between Gaussians fitted to two sets of vectors (n, d)."""
    a, b = a.double(), b.double()
    root = _square_root(a.T.cov())
    mixed = _square_root(root @ b.T.cov() @ root)
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return float(gap + (a.T.cov() + b.T.cov() - 2 * mixed).trace())


@torch.no_grad()
def embed(judge: Judge, pictures: Tensor) -> Tensor:
    """The judge's instance embedding of pictures uint8, (n, 48)."""
    return torch.cat([judge.embed(judge.features(to_judge(x))) for x in pictures.split(128)])


@torch.no_grad()
def read_back(judge: Judge, pictures: Tensor, specs: Specs, texts: list[str]) -> dict[str, float]:
    """Share of pictures uint8 in which the judge reads what their captions say, by attribute.

    Colour and pattern are asked of photographs of one thing, size of one thing; two things of
    different kinds are both right, or both in the right places where the caption gives places.
    """
    logits = judge.read(torch.cat([judge.features(to_judge(x)) for x in pictures.split(128)]))
    found = {name: value.argmax(1) for name, value in logits.items()}
    single, photo = ~specs.two, specs.style == STYLES.index("photo")
    color = specs.color[:, 0]
    named = [COLOR_NAMES[c] if c < UNNAMED_COLOR else "" for c in color.tolist()]
    pattern = [PATTERN_WORDS.get(PATTERNS[p], ()) for p in specs.pattern[:, 0].tolist()]
    size = [SIZE_WORDS[s] for s in specs.size_class[:, 0].tolist()]
    plain = specs.scene == SCENES.index("plain")
    both = specs.kind.sort(1).values
    different = specs.two & (both[:, 0] != both[:, 1])
    top = logits["kind"].topk(2, 1).indices.sort(1).values
    left = torch.where(specs.first_is_left, specs.kind[:, 0], specs.kind[:, 1])
    right = torch.where(specs.first_is_left, specs.kind[:, 1], specs.kind[:, 0])
    sides = [
        judge.read(judge.features(to_judge(half(pictures, side))))["kind"].argmax(1)
        for side in (True, False)
    ]
    placed = _says(texts, [("left",)] * len(texts))
    return {
        "kind": _share(found["kind"] == specs.kind[:, 0], single),
        "scene": _share(
            found["scene"] == specs.scene, _says(texts, [_SCENE_HINTS] * len(texts)) | plain
        ),
        "style": _share(found["style"] == specs.style, torch.ones_like(single)),
        "color": _share(
            found["color"] == color, _says(texts, [(c,) for c in named]) & single & photo
        ),
        "pattern": _share(
            found["pattern"] == specs.pattern[:, 0], _says(texts, pattern) & single & photo
        ),
        "size": _share(found["size_class"] == specs.size_class[:, 0], _says(texts, size) & single),
        "both_kinds": _share((top == both).all(1), different),
        "places": _share((sides[0] == left) & (sides[1] == right), different & placed),
    }


@torch.no_grad()
def caption_accuracy(
    model: Any, clip: Any, vae: Any, judge: Judge, count: int, seed: int
) -> tuple[dict[str, float], Tensor, Tensor]:
    """What is read back from pictures of held-out captions, and their Fréchet distance.

    The distance is that to the renderings the captions were made for, in the judge's embedding; its
    floor is that of other renderings. Returns the figures, the pictures and the renderings.
    """
    specs = sample_specs(count, seed)
    texts = captions(specs, seed)
    pictures = generate(model, clip, vae, texts, seed)
    own, others = render(specs)[0], render(sample_specs(count, seed + 1))[0]
    reference = embed(judge, own)
    figures = {
        "captions": count,
        **read_back(judge, pictures, specs, texts),
        "frechet": round(frechet_distance(embed(judge, pictures), reference), 4),
        "frechet_floor": round(frechet_distance(embed(judge, others), reference), 4),
    }
    return figures, pictures, own
