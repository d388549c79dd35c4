"""How well the base model learned its captions, as the judge reads its pictures."""

from typing import Any

import torch
from torch import Tensor

from .captions import captions
from .fidelity import to_judge
from .generate import generate
from .judge import Judge
from .specs import COLOR_NAMES, STYLES, UNNAMED_COLOR, sample_specs


@torch.no_grad()
def caption_accuracy(
    model: Any, clip: Any, vae: Any, judge: Judge, count: int, seed: int
) -> tuple[dict[str, float], Tensor]:
    """Shares of right class, scene, style, colour and both classes over held-out captions.

    Colour counts where the caption names one and the style is photo, single things only; scene
    where the caption names it or the background is plain. Returns the figures and the pictures.
    """
    specs = sample_specs(count, seed)
    texts = captions(specs, seed)
    pictures = generate(model, clip, vae, texts, seed)
    logits = judge.read(judge.features(to_judge(pictures)))
    single, photo = ~specs.two, specs.style == STYLES.index("photo")
    names_scene = torch.tensor([any(w in t for w in _SCENE_HINTS) for t in texts]) | (
        specs.scene == 0
    )
    names_color = (
        torch.tensor(
            [
                int(c) != UNNAMED_COLOR and COLOR_NAMES[int(c)] in t.split()
                for c, t in zip(specs.color[:, 0], texts, strict=True)
            ]
        )
        & single
        & photo
    )
    both = specs.kind.sort(1).values
    different = specs.two & (both[:, 0] != both[:, 1])
    top = logits["kind"].topk(2, 1).indices.sort(1).values

    def share(right: Tensor, rows: Tensor) -> float:
        return round(float(right[rows].float().mean()), 3)

    return {
        "captions": count,
        "class": share(logits["kind"].argmax(1) == specs.kind[:, 0], single),
        "scene": share(logits["scene"].argmax(1) == specs.scene, names_scene),
        "style": share(logits["style"].argmax(1) == specs.style, torch.ones_like(single)),
        "color": share(logits["color"].argmax(1) == specs.color[:, 0], names_color),
        "both_classes": share((top == both).all(1), different),
    }, pictures


_SCENE_HINTS = (
    "beach",
    "sea",
    "snow",
    "forest",
    "woods",
    "desert",
    "dune",
    "city",
    "street",
    "space",
)
