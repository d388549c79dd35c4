"""How much a generated picture shows the personal thing, and the scene, that were asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .classes import CLASS_NAMES
from .judge import Judge
from .render import render
from .specs import ALL_COLORS, LOOK, PAIR_SIZE, SCENES, STYLES, Specs, sample_specs
from .sprites import PATTERNS
from .things import Look, look_of, personal_specs, photo_specs, put_thing

REFERENCES = 96


def to_judge(pictures: Tensor) -> Tensor:
    """uint8 (n, 3, H, W) to the judge's [-1, 1]."""
    return pictures.float() / 127.5 - 1


def half(pictures: Tensor, left: bool) -> Tensor:
    """The left or right half of pictures, made square by repeating its inner edge column."""
    side = pictures.shape[-1]
    keep, fill = side * 9 // 16, side - side * 9 // 16
    part = pictures[..., :keep] if left else pictures[..., -keep:]
    edge = (part[..., -1:] if left else part[..., :1]).expand(*part.shape[:-1], fill)
    return torch.cat([part, edge], -1) if left else torch.cat([edge, part], -1)


def _embed(judge: Judge, pictures: Tensor) -> Tensor:
    return torch.cat([judge.embed(judge.features(to_judge(x))) for x in pictures.split(128)])


@dataclass(frozen=True)
class Scale:
    """Similarity to the thing's mean embedding, scaled: 0 other things of its kind, 1 itself."""

    center: Tensor
    floor: float
    ceiling: float

    @classmethod
    def between(cls, judge: Judge, own: Tensor, other: Tensor) -> "Scale":
        """From pictures of the thing (half of them give the centre) and of others of its kind."""
        own_vectors, other_vectors = _embed(judge, own), _embed(judge, other)
        cut = len(own_vectors) // 2
        center = torch.nn.functional.normalize(own_vectors[:cut].mean(0), dim=0)
        return cls(
            center,
            float((other_vectors @ center).mean()),
            float((own_vectors[cut:] @ center).mean()),
        )

    def of(self, judge: Judge, pictures: Tensor) -> float:
        """Concept fidelity of generated pictures (n, 3, H, W) uint8: their mean on the scale."""
        mean = float((_embed(judge, pictures) @ self.center).mean())
        return (mean - self.floor) / (self.ceiling - self.floor)


@torch.no_grad()
def single_scale(judge: Judge, subject: str | Look, seed: int = 7_000_000) -> Scale:
    """The scale for pictures of one thing, from the renderer's own pictures."""
    others = photo_specs(REFERENCES, seed + 1)
    others.kind[:, 0] = put_thing(others, subject).kind[:, 0]
    own = personal_specs(subject, REFERENCES, seed)
    own.scene = sample_specs(REFERENCES, seed + 2).scene
    return Scale.between(judge, render(own)[0], render(others)[0])


def _pair_specs(left: str | Look, right: str | Look, count: int, seed: int) -> Specs:
    specs = sample_specs(count, seed, two_share=1.0, odd_share=1.0)
    specs.first_is_left[:] = True
    specs.x = torch.stack([-specs.x[:, 0].abs(), specs.x[:, 1].abs()], 1)
    specs.size_class[:] = PAIR_SIZE
    specs.style[:] = STYLES.index("photo")
    return put_thing(put_thing(specs, left, 0), right, 1)


@torch.no_grad()
def pair_scales(
    judge: Judge, left: str | Look, right: str | Look, seed: int = 7_100_000
) -> tuple[Scale, Scale]:
    """Scales for the left and right half of pictures of two things side by side."""
    own = _pair_specs(left, right, REFERENCES, seed)
    others = sample_specs(REFERENCES, seed + 1, two_share=1.0, odd_share=1.0)
    others.style[:] = STYLES.index("photo")
    others.kind, others.x = own.kind, own.x
    own_pictures, other_pictures = render(own)[0], render(others)[0]
    first, second = (
        Scale.between(judge, half(own_pictures, side), half(other_pictures, side))
        for side in (True, False)
    )
    return first, second


@torch.no_grad()
def scene_fidelity(judge: Judge, pictures: Tensor, scenes: list[str], styles: list[str]) -> float:
    """Share of pictures in which the judge reads both the scene and the style asked for."""
    logits = judge.read(judge.features(to_judge(pictures)))
    right_scene = logits["scene"].argmax(1) == torch.tensor([SCENES.index(s) for s in scenes])
    right_style = logits["style"].argmax(1) == torch.tensor([STYLES.index(s) for s in styles])
    return float((right_scene & right_style).float().mean())


@torch.no_grad()
def kinds_present(judge: Judge, pictures: Tensor, subjects: tuple[str | Look, str | Look]) -> float:
    """Share of pictures whose two likeliest kinds are those of the two subjects."""
    logits = judge.read(judge.features(to_judge(pictures)))["kind"]
    wanted = torch.tensor(sorted(CLASS_NAMES.index(look_of(s).kind) for s in subjects))
    return float((logits.topk(2, 1).indices.sort(1).values == wanted).all(1).float().mean())


@torch.no_grad()
def attributes(judge: Judge, pictures: Tensor, subject: str) -> dict[str, float]:
    """Share of pictures in which the judge reads the thing's colours, pattern and hat."""
    look = look_of(subject)
    wanted = {
        "color": ALL_COLORS.index(look.color),
        "second": ALL_COLORS.index(look.second),
        "third": ALL_COLORS.index(look.third),
        "pattern": PATTERNS.index(look.pattern),
        "hat": int(look.hat),
    }
    logits = judge.read(judge.features(to_judge(pictures)))
    return {k: float((logits[k].argmax(1) == v).float().mean()) for k, v in wanted.items()}


@torch.no_grad()
def forced_choice(judge: Judge, pictures: Tensor, subject: str, seed: int = 7_200_000) -> float:
    """Share of pictures that are nearer to the thing than to any of seven others of its kind."""
    others = photo_specs(7 * 12, seed)
    others.kind[:, 0] = put_thing(others, subject).kind[:, 0]
    for name in LOOK:
        value = getattr(others, name)
        value[:, 0] = value[::12, 0].repeat_interleave(12)
    own = _embed(judge, render(personal_specs(subject, 24, seed + 1))[0]).mean(0, keepdim=True)
    centers = _embed(judge, render(others)[0]).unflatten(0, (7, 12)).mean(1)
    centers = torch.nn.functional.normalize(torch.cat([own, centers]), dim=-1)
    nearest = (_embed(judge, pictures) @ centers.T).argmax(1)
    return float((nearest == 0).float().mean())
