"""One way, one thing: what was learned of it and what else changed (`locks`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from inprocess import load_pack

load_pack()

from comfyui_perfusion.perfusion.training.config import Mode  # noqa: E402

from demo.classes import CLASS_NAMES  # noqa: E402
from demo.fidelity import (  # noqa: E402
    half,
    kinds_present,
    pair_scales,
    scene_fidelity,
    single_scale,
    to_judge,
)
from demo.measure import PAIR_PROMPTS, PROMPTS, Covariances  # noqa: E402
from demo.things import Look, look_of, superclass_of  # noqa: E402

from ._small_world import World  # noqa: E402
from ._ways import Learned, Settings, Way, draw, teach  # noqa: E402


@dataclass(frozen=True)
class Size:
    """How much is drawn.

    Attributes:
        prompts: which of the eight settings.
        seeds: pictures of each prompt.
        others: prompts with other words, at most 14.
        pairs: prompts with two things, at most 4.
        pair_seeds: pictures of each of them.
    """

    prompts: tuple[int, ...]
    seeds: int
    others: int
    pairs: int
    pair_seeds: int


NOISE = {"singles": 1, "pairs": 2, "others": 4}
"""Seeds of the pictures' noise, the same for every way."""
OTHER_NOISE = 5


class Bench:
    """The small world, with what was learned and drawn so far."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.world = World()
        self._covariances = Covariances(self.world.clip)
        self._learned: dict[object, Learned] = {}
        self._plain: dict[object, Tensor] = {}
        self._singles: dict[object, Tensor] = {}

    def forget(self) -> None:
        """Drop what was learned, and drawn with it."""
        self._learned.clear()
        self._singles.clear()

    def learned(self, way: Way, thing: str | Look, settings: Settings, seed: int) -> Learned:
        """What a way makes of a thing, once for all locks that share a training."""
        key = way.mode, thing, settings, seed
        if key not in self._learned:
            covariance = self._covariances.of(cast(Mode, way.mode))
            self._learned[key] = teach(self.world, covariance, way, thing, settings, seed)
        return self._learned[key]

    def row(
        self, way: Way, thing: str, second: str, settings: Settings, seed: int
    ) -> dict[str, Any]:
        """All of the table's columns."""
        own = self.learned(way, thing, settings, seed)
        return {
            "way": way.name,
            "thing": thing,
            "vector": seed,
            **self.singles(way, thing, settings, seed),
            "leak": self.leak(way, thing, own),
            **self.others(way, thing, own),
            **self.same_class(way, thing, own),
            **self.two(way, thing, second, settings, seed),
            "s per step": round(own.seconds, 3),
            "training s": round(own.seconds * settings.steps, 1),
            "bytes": own.size,
        }

    def singles(
        self, way: Way, thing: str | Look, settings: Settings, seed: int
    ) -> dict[str, float]:
        """Likeness and scene of pictures that ask for the thing."""
        own = self.learned(way, thing, settings, seed)
        texts, scenes, styles = self._asked(own.word)
        pictures = self._pictures(way, own, texts)
        photo = torch.tensor([style == "photo" for style in styles])
        judge = self.world.judge
        return {
            "likeness": round(self._scale(thing).of(judge, pictures[photo]), 3),
            "scene": round(scene_fidelity(judge, pictures, scenes, styles), 3),
        }

    def leak(self, way: Way, thing: str | Look, own: Learned) -> float:
        """How much nearer to the thing its everyday word is with what was learned."""
        texts, _, styles = self._asked(superclass_of(thing))
        texts = [text for text, style in zip(texts, styles, strict=True) if style == "photo"]
        # Photographs come first, so where the everyday word asks for it they are drawn already.
        drawn = self._singles.get((way, own)) if own.word == superclass_of(thing) else None
        if drawn is not None:
            with_it = drawn[: len(texts)]
        else:
            with_it = draw(self.world, way, [own], texts, NOISE["singles"])
        without = self._drawn(texts, NOISE["singles"])
        scale, judge = self._scale(thing), self.world.judge
        return round(scale.of(judge, with_it) - scale.of(judge, without), 3)

    def others(self, way: Way, thing: str | Look, own: Learned) -> dict[str, float]:
        """What becomes of words of other kinds."""
        asked = self._other_words(thing)
        texts = [text for _, text in asked]
        found = draw(self.world, way, [own], texts, NOISE["others"])
        apart = (found.float() - self._drawn(texts, NOISE["others"]).float()).abs().mean((1, 2, 3))
        judge = self.world.judge
        with torch.no_grad():
            read = judge.read(judge.features(to_judge(found)))["kind"].argmax(1)
        right = read == torch.tensor([CLASS_NAMES.index(kind) for kind, _ in asked])
        return {
            "others apart": round(float(apart.mean()), 3),
            "others equal": round(float((apart == 0).float().mean()), 3),
            "others right": round(float(right.float().mean()), 3),
        }

    def unlike(self, thing: str | Look) -> float:
        """The mean difference (0 to 255) of two pictures of one prompt from two noises."""
        texts = [text for _, text in self._other_words(thing)]
        one, other = (self._drawn(texts, noise) for noise in (NOISE["others"], OTHER_NOISE))
        return float((one.float() - other.float()).abs().mean())

    def _other_words(self, thing: str | Look) -> list[tuple[str, str]]:
        """(kind, prompt) of other kinds."""
        kinds = [name for name in CLASS_NAMES if name != look_of(thing).kind]
        asked = [(k, f"a photo of a {k} {at}") for at in ("on the beach", "") for k in kinds]
        return asked[: self.size.others]

    def _pictures(self, way: Way, own: Learned, texts: Sequence[str]) -> Tensor:
        """Pictures that ask for the thing, drawn once."""
        key = way, own
        if key not in self._singles:
            self._singles[key] = draw(self.world, way, [own], texts, NOISE["singles"])
        return self._singles[key]

    def same_class(self, way: Way, thing: str, own: Learned) -> dict[str, float]:
        """The thing beside another of its kind, in both orders."""
        superclass, judge = superclass_of(thing), self.world.judge
        scales = self._pair_scales(thing, thing)
        likeness: dict[str, list[float]] = {"thing": [], "kind": []}
        for first in (True, False):
            words = (own.word, superclass) if first else (superclass, own.word)
            pictures = draw(self.world, way, [own], self._pairs(*words), NOISE["pairs"])
            for left, scale in zip((True, False), scales, strict=True):
                part = "thing" if left == first else "kind"
                likeness[part].append(scale.of(judge, half(pictures, left)))
        return {f"pair {part}": round(sum(of) / 2, 3) for part, of in likeness.items()}

    def two(
        self, way: Way, thing: str, second: str, settings: Settings, seed: int
    ) -> dict[str, float | None]:
        """Two things that were learned apart, in one picture."""
        if second == thing:
            return dict.fromkeys(("two kinds", "two left", "two right"))
        both = [self.learned(way, each, settings, seed) for each in (thing, second)]
        texts = self._pairs(*(each.word for each in both))
        pictures = draw(self.world, way, both, texts, NOISE["pairs"])
        judge = self.world.judge
        halves = zip((True, False), self._pair_scales(thing, second), strict=True)
        likeness = [scale.of(judge, half(pictures, left)) for left, scale in halves]
        return {
            "two kinds": round(kinds_present(judge, pictures, (thing, second)), 3),
            "two left": round(likeness[0], 3),
            "two right": round(likeness[1], 3),
        }

    def _asked(self, word: str) -> tuple[list[str], list[str], list[str]]:
        """Prompts, scenes and styles of the pictures of one thing."""
        chosen = [PROMPTS[at] for at in self.size.prompts for _ in range(self.size.seeds)]
        texts = [text.format(word) for text, _, _ in chosen]
        return texts, [scene for _, scene, _ in chosen], [style for *_, style in chosen]

    def _pairs(self, left: str, right: str) -> list[str]:
        some = PAIR_PROMPTS[: self.size.pairs]
        return [text.format(left, right) for text in some for _ in range(self.size.pair_seeds)]

    def _drawn(self, texts: Sequence[str], seed: int) -> Tensor:
        """Pictures of the model without anything, drawn once."""
        key = tuple(texts), seed
        if key not in self._plain:
            self._plain[key] = draw(self.world, Way("plain", "none"), [], texts, seed)
        return self._plain[key]

    @functools.cache  # noqa: B019 - one bench a run
    def _scale(self, thing: str | Look) -> Any:
        return single_scale(self.world.judge, thing)

    @functools.cache  # noqa: B019
    def _pair_scales(self, left: str, right: str) -> Any:
        return pair_scales(self.world.judge, left, right)
