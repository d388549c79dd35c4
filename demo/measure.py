"""The demo's figures: ``python -m demo.measure --output DIR --concept FILE``.

Compares a trained concept with the superclass word and with textual inversion of the same steps,
puts two concepts trained apart into one picture, looks at what should have stayed as it was (the
superclass word, other words, a thing of the same kind beside it), and writes ``figures.json`` and
contact sheets.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inprocess import load_pack

load_pack()

from comfyui_perfusion.demo.model.small_model import load_small_model  # noqa: E402
from comfyui_perfusion.host.injection.apply import apply_concepts  # noqa: E402
from comfyui_perfusion.host.pictures.training_images import encode_images  # noqa: E402
from comfyui_perfusion.host.text.covariance import measure_covariance  # noqa: E402
from comfyui_perfusion.host.training.view import training_view  # noqa: E402
from comfyui_perfusion.perfusion import (  # noqa: E402
    Concept,
    Covariance,
    TrainingConfig,
    load_concept,
    train_concept,
)
from comfyui_perfusion.perfusion.gated.covariance import Positions  # noqa: E402
from comfyui_perfusion.perfusion.training.config import Mode, counted_positions  # noqa: E402

from .captions import sample_captions  # noqa: E402
from .classes import CLASS_NAMES  # noqa: E402
from .fidelity import (  # noqa: E402
    attributes,
    forced_choice,
    half,
    kinds_present,
    pair_scales,
    scene_fidelity,
    single_scale,
)
from .generate import generate  # noqa: E402
from .judge import Judge, load_judge  # noqa: E402
from .sheet import sheet  # noqa: E402
from .things import THINGS, superclass_of  # noqa: E402
from .world import WEIGHTS, personal_pictures, world_weights  # noqa: E402

SUBJECT, SECOND = "Bo the teddy", "Olli the mug"
PLACEHOLDER, SECOND_PLACEHOLDER = "<bo>", "<olli>"
SEEDS = 4
LEARNING_RATE = TrainingConfig.learning_rate  # as in the templates
PROMPTS = (
    ("a photo of a {} on the beach", "beach", "photo"),
    ("a photo of a {} in the desert", "desert", "photo"),
    ("a photo of a {} in space", "space", "photo"),
    ("a photo of a {} in the snow", "snow", "photo"),
    ("a photo of a {} in the forest", "forest", "photo"),
    ("a photo of a {} in the city", "city", "photo"),
    ("a sketch of a {} on the beach", "beach", "sketch"),
    ("a sketch of a {} in the forest", "forest", "sketch"),
)
PAIR_PROMPTS = tuple(
    "on the left a {} and on the right a {} " + scene
    for scene in ("on the beach", "in the desert", "in the snow", "in the city")
)


class Covariances:
    """Statistics of a text encoder's encodings, by the tokens that are counted; measured once."""

    def __init__(self, clip: Any) -> None:
        self._clip = clip
        self._measured: dict[Positions, Covariance] = {}

    def of(self, mode: Mode) -> Covariance:
        """Those that a training of this mode takes."""
        positions = counted_positions(mode)
        if positions not in self._measured:
            self._measured[positions] = measure_covariance(
                self._clip, sample_captions(600), positions=positions
            )
        return self._measured[positions]


class World:
    """The small world's model with what measuring needs of it."""

    def __init__(self) -> None:
        self.model, self.clip, self.vae = load_small_model(world_weights())
        self.judge: Judge = load_judge(WEIGHTS / "judge.safetensors")
        self.covariance = Covariances(self.clip).of

    def train(self, subject: str, config: TrainingConfig, count: int = 5) -> Concept:
        """A concept trained as the node does it."""
        images, masks = personal_pictures(subject, count, 0)
        words = config.superclass, config.placeholder
        shown = encode_images(self.vae, [images], [masks])
        with training_view(self.model, self.clip, shown, *words) as view:
            return train_concept(view, config, self.covariance(config.mode)).concept

    def pictures(self, concepts: list[Concept], prompts: list[str], seed: int) -> Tensor:
        """Pictures of prompts with these concepts, uint8 (n, 3, 64, 64)."""
        model, clip = self.model, self.clip
        if concepts:
            lock = "twin" if all(concept.twin_locked for concept in concepts) else "local"
            model, clip = apply_concepts(model, clip, concepts, lock)
        return generate(model, clip, self.vae, prompts, seed)


def single_figures(
    world: World, variants: dict[str, tuple[list[Concept], str]]
) -> tuple[dict[str, Any], Tensor]:
    """Concept and scene fidelity of every variant (its concepts, the word in the prompts)."""
    asked = [prompt for prompt in PROMPTS for _ in range(SEEDS)]
    scenes, styles = [s for _, s, _ in asked], [s for _, _, s in asked]
    photo = torch.tensor([style == "photo" for style in styles])
    scale = single_scale(world.judge, SUBJECT)
    figures: dict[str, Any] = {"concept_fidelity": {}, "scene_fidelity": {}, "attributes": {}}
    shown = []
    for name, (concepts, word) in variants.items():
        pictures = world.pictures(concepts, [text.format(word) for text, _, _ in asked], seed=1)
        figures["concept_fidelity"][name] = round(scale.of(world.judge, pictures[photo]), 3)
        figures["scene_fidelity"][name] = round(
            scene_fidelity(world.judge, pictures, scenes, styles), 3
        )
        figures["attributes"][name] = attributes(world.judge, pictures[photo], SUBJECT)
        shown.append(pictures[::SEEDS])
    return figures, torch.cat(shown)


def thing_figures(world: World, config: TrainingConfig) -> tuple[dict[str, Any], Tensor]:
    """Concept fidelity of every personal thing, each trained alike, and of its superclass word.

    Beside it: how often the judge takes the thing for this one rather than for one of seven others
    of its kind, and its attributes as the judge reads them.
    """
    photos = [prompt for prompt in PROMPTS if prompt[2] == "photo"]
    asked = [text for text, _, _ in photos for _ in range(SEEDS)]
    figures: dict[str, Any] = {}
    shown = []
    for subject in THINGS:
        superclass = superclass_of(subject)
        concept = world.train(subject, replace(config, superclass=superclass))
        scale = single_scale(world.judge, subject)
        figures[subject] = {}
        for name, concepts, word in (
            ("superclass", [], superclass),
            ("perfusion", [concept], config.placeholder),
        ):
            pictures = world.pictures(concepts, [text.format(word) for text in asked], seed=1)
            figures[subject][name] = round(scale.of(world.judge, pictures), 3)
        figures[subject]["forced_choice"] = forced_choice(world.judge, pictures, subject)
        figures[subject]["attributes"] = attributes(world.judge, pictures, subject)
        shown += [photographs_of(subject)[:2], pictures[::SEEDS]]
    return figures, torch.cat(shown)


def photographs_of(subject: str) -> Tensor:
    """The five training pictures of a thing, uint8 (5, 3, 64, 64)."""
    images = personal_pictures(subject, 5, 0)[0]
    return (images * 255).round().to(torch.uint8).permute(0, 3, 1, 2)


def pair_figures(world: World, concepts: list[Concept]) -> tuple[dict[str, Any], Tensor]:
    """Two concepts in one picture, beside the same prompts with the superclass words."""
    prompts = [prompt for prompt in PAIR_PROMPTS for _ in range(SEEDS)]
    scales = pair_scales(world.judge, SUBJECT, SECOND)
    figures: dict[str, Any] = {}
    shown = []
    for name, used, words in (
        ("superclass", [], (superclass_of(SUBJECT), superclass_of(SECOND))),
        ("perfusion", concepts, (PLACEHOLDER, SECOND_PLACEHOLDER)),
    ):
        pictures = world.pictures(used, [text.format(*words) for text in prompts], seed=2)
        figures[name] = {
            "both_kinds": round(kinds_present(world.judge, pictures, (SUBJECT, SECOND)), 3),
            "fidelity_first": round(scales[0].of(world.judge, half(pictures, left=True)), 3),
            "fidelity_second": round(scales[1].of(world.judge, half(pictures, left=False)), 3),
        }
        shown.append(pictures[:: SEEDS // 2])
    return figures, torch.cat(shown)


def preservation_figures(world: World, concept: Concept) -> tuple[dict[str, Any], Tensor]:
    """What applying a concept changes where it is not asked for, and beside one of its kind.

    ``superclass_leak``: how much more like the thing its superclass word becomes; ``other_words``:
    the mean difference of pictures of other words (0 to 255) and the share of equal ones;
    ``same_class_pair``: fidelity of the half that shall show the thing and of the other one.
    """
    superclass, photos = superclass_of(SUBJECT), [p for p, _, style in PROMPTS if style == "photo"]
    scale = single_scale(world.judge, SUBJECT)
    asked = [text.format(superclass) for text in photos for _ in range(SEEDS)]
    with_it, without = (
        scale.of(world.judge, world.pictures(used, asked, seed=1)) for used in ([concept], [])
    )
    words = [name for name in CLASS_NAMES if name != THINGS[SUBJECT].kind]
    others = [f"a photo of a {word} {place}" for word in words for place in ("", "on the beach")]
    found, plain = (world.pictures(used, others, seed=4).float() for used in ([concept], []))
    difference = (found - plain).abs().mean((1, 2, 3))
    left, right = pair_scales(world.judge, SUBJECT, SUBJECT)
    prompts = [p.format(PLACEHOLDER, superclass) for p in PAIR_PROMPTS for _ in range(SEEDS)]
    pictures = world.pictures([concept], prompts, seed=2)
    return {
        "superclass_leak": round(with_it - without, 3),
        "other_words": {
            "difference": round(float(difference.mean()), 3),
            "equal": round(float((difference == 0).float().mean()), 3),
        },
        "same_class_pair": {
            "thing": round(left.of(world.judge, half(pictures, left=True)), 3),
            "superclass": round(right.of(world.judge, half(pictures, left=False)), 3),
        },
    }, pictures[:: SEEDS // 2]


def overhead_ratio(world: World, concept: Concept, rounds: int = 7) -> float:
    """Median time of a 20-step picture with one concept over that without, taken in turns."""

    def timed(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    prompts = [f"a photo of a {superclass_of(SUBJECT)} in the snow"]
    model, clip = apply_concepts(world.model, world.clip, [concept], "twin")
    plain, edited = [], []
    for _ in range(rounds):
        plain.append(timed(lambda: generate(world.model, world.clip, world.vae, prompts, 3)))
        edited.append(timed(lambda: generate(model, clip, world.vae, prompts, 3)))
    return round(statistics.median(edited) / statistics.median(plain), 3)


def measure(
    output: Path, concept_path: Path | None, steps: int, all_things: bool = False
) -> dict[str, Any]:
    """All figures; trains what ``concept_path`` does not already hold."""
    started = time.time()
    world = World()
    shared: dict[str, Any] = {
        "steps": steps,
        "batch_size": 4,
        "learning_rate": LEARNING_RATE,
        "schedule": "cosine",
        "mode": "twin_lock",
    }
    config = TrainingConfig(PLACEHOLDER, superclass_of(SUBJECT), **shared)
    second = TrainingConfig(SECOND_PLACEHOLDER, superclass_of(SECOND), **shared)
    # The vector alone has to carry everything and wants larger steps.
    inversion = replace(config, mode="textual_inversion", embedding_learning_rate=3.0)
    figures: dict[str, Any] = {"steps": steps}
    trained = time.time()
    concept = load_concept(concept_path) if concept_path else world.train(SUBJECT, config)
    figures["train_seconds"] = round(time.time() - trained, 1)
    by_word = world.train(SUBJECT, inversion)
    other = world.train(SECOND, second)
    variants = {
        "superclass": ([], superclass_of(SUBJECT)),
        "textual_inversion": ([by_word], PLACEHOLDER),
        "perfusion": ([concept], PLACEHOLDER),
    }
    singles, single_pictures = single_figures(world, variants)
    pairs, pair_pictures = pair_figures(world, [concept, other])
    figures.update(singles)
    figures["two_concepts"] = pairs
    kept, same_class_pictures = preservation_figures(world, concept)
    figures.update(kept)
    figures["overhead_ratio"] = overhead_ratio(world, concept)
    if concept_path:
        figures["concept_bytes"] = concept_path.stat().st_size
    figures["pictures_per_figure"] = {
        "singles": len(PROMPTS) * SEEDS,
        "pairs": len(PAIR_PROMPTS) * SEEDS,
    }
    figures["measure_seconds"] = round(time.time() - started, 1)
    if all_things:
        figures["things"], pictures = thing_figures(world, config)
        sheet(pictures, 8, scale=2).save(output / "things.png")
    sheet(photographs_of(SUBJECT), 5).save(output / "photographs.png")
    sheet(single_pictures, len(PROMPTS), scale=3).save(output / "comparison.png")
    sheet(pair_pictures, len(PAIR_PROMPTS) * 2, scale=3).save(output / "two_concepts.png")
    sheet(same_class_pictures, len(PAIR_PROMPTS) * 2, scale=3).save(output / "one_of_each.png")
    return figures


def table(figures: dict[str, Any]) -> str:
    """The figures as a person reads them."""
    lines = [f"{'':22}{'superclass word':>18}{'textual inversion':>20}{'Perfusion':>12}"]
    for name in ("concept_fidelity", "scene_fidelity"):
        row = figures[name]
        cells = (row["superclass"], row["textual_inversion"], row["perfusion"])
        lines.append(
            f"{name.replace('_', ' '):22}{cells[0]:>18.2f}{cells[1]:>20.2f}{cells[2]:>12.2f}"
        )
    pair = figures["two_concepts"]
    lines.append(
        f"two concepts: both kinds in {pair['perfusion']['both_kinds']:.0%} of pictures "
        f"(superclass words {pair['superclass']['both_kinds']:.0%}), fidelity "
        f"{pair['perfusion']['fidelity_first']:.2f} and {pair['perfusion']['fidelity_second']:.2f} "
        f"(superclass words {pair['superclass']['fidelity_first']:.2f} and "
        f"{pair['superclass']['fidelity_second']:.2f})"
    )
    kept, pair = figures["other_words"], figures["same_class_pair"]
    lines.append(
        f"with the concept applied: superclass word {figures['superclass_leak']:+.2f} nearer to "
        f"the thing, other words {kept['difference']:.2f} of 255 apart "
        f"({kept['equal']:.0%} equal); "
        f"the thing beside its kind {pair['thing']:.2f}, its kind {pair['superclass']:.2f}"
    )
    for name, unit in (
        ("train_seconds", "s"),
        ("image_seconds", "s"),
        ("concept_bytes", "bytes"),
        ("overhead_ratio", "x"),
    ):
        if figures.get(name) is not None:
            lines.append(f"{name.replace('_', ' ')}: {figures[name]:g} {unit}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--concept", type=Path, help="a concept of the demo's first subject")
    parser.add_argument("--steps", type=int, default=150, help="training steps of what is compared")
    parser.add_argument("--all-things", action="store_true", help="measure every personal thing")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    figures = measure(arguments.output, arguments.concept, arguments.steps, arguments.all_things)
    run = arguments.output / "run.json"
    if run.exists():
        measured = json.loads(run.read_text(encoding="utf-8"))
        figures.update(
            {k: measured[k] for k in ("train_seconds", "image_seconds") if measured.get(k)}
        )
    training = json.loads((WEIGHTS / "training.json").read_text(encoding="utf-8"))
    figures["judge"] = training.get("judge")
    figures["base_model"] = training.get("captions")
    figures["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__}
    (arguments.output / "figures.json").write_text(
        json.dumps(figures, indent=1) + "\n", encoding="utf-8"
    )
    sys.stdout.write(table(figures) + "\n")


if __name__ == "__main__":
    main()
