"""What closed-form edits do to the small world's pictures: `python dev.py bench edit`.

Three tables, every figure in per cent of pictures as the judge reads them (a small network trained
on renderings only; `demo/weights/training.json` says how reliable it is), and grids of pictures.

- Assumptions (TIME, section 5): each kind of thing has a usual colour; an edit makes another one
  usual. As in the paper the choice is between the old and the new attribute. Efficacy: the source
  prompt shows the new colour. Generality: so do other prompts with the word (synonyms apart: the
  paper has none). Specificity: other kinds still show their own usual colour. F1: harmonic mean of
  generality and specificity. Unedited is the paper's baseline, its oracle gets the destination
  prompt. "kind": the picture shows the kind of thing that was asked for.
- Erasing (MACE, section 4): accuracy on erased words (lower is better), on synonyms of them
  (lower), on unrelated words (higher), and their harmonic mean H_o = 3 / (1 / (1 - erased) +
  1 / unrelated + 1 / (1 - synonyms)). There are 8 kinds, so the ten concepts are seven kinds and
  three scenes. The judge must answer with some kind even for a picture of nothing in particular:
  "anchor word" draws the anchor in place of every erased word, and is what can be hoped for.
- Debiasing (UCE, section 4): shares of two colours, edited again with the new shares each time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inprocess import load_pack

load_pack()

from comfyui_perfusion.host.text.caption_sources import sentences_known_to  # noqa: E402
from comfyui_perfusion.perfusion.closed_form.counts import Counted  # noqa: E402
from comfyui_perfusion.perfusion.closed_form.erasure import GENERIC_ANCHOR, Erasure  # noqa: E402
from comfyui_perfusion.perfusion.closed_form.mace import refinement_constraints  # noqa: E402
from comfyui_perfusion.perfusion.closed_form.preserve import preserve  # noqa: E402
from comfyui_perfusion.perfusion.closed_form.solver import Constraints  # noqa: E402
from comfyui_perfusion.perfusion.closed_form.time import RIDGE, time_constraints  # noqa: E402
from comfyui_perfusion.perfusion.closed_form.uce import RIDGE as UCE_RIDGE  # noqa: E402
from comfyui_perfusion.perfusion.closed_form.uce import (  # noqa: E402
    Debiasing,
    debias_constraints,
    replacement_constraints,
)

from demo.classes import CLASS_NAMES, KINDS  # noqa: E402
from demo.sheet import sheet  # noqa: E402
from demo.specs import COLOR_NAMES, SCENES  # noqa: E402

from ._report import RESULTS, print_table, write_results  # noqa: E402
from ._small_world import World, share  # noqa: E402

NEW_COLORS = {
    "mug": "blue",
    "teddy": "green",
    "cat": "purple",
    "car": "yellow",
    "house": "red",
    "robot": "pink",
    "fish": "orange",
    "mushroom": "blue",
}
SOURCE = "a photo of a {}"
CARRIED = "words only, carry 0.3, prior 30"
RELATED = ("a {} on the beach", "a {} in the snow", "a photo of a {} in the city", "a small {}")
ERASED_SETS = {
    1: (("mug",), ()),
    5: (("mug", "cat", "car", "robot", "fish"), ()),
    10: (tuple(name for name in CLASS_NAMES if name != "house"), ("beach", "desert", "space")),
}
SCENE_PHRASES = {"beach": "on the beach", "desert": "in the desert", "space": "in space"}
SCENE_SENTENCES = ("a photo of a cat in the {}", "a house on the {}", "a mug in {}")
PRIOR = 1000.0
UNEDITED, ANCHOR = "unedited", "anchor word (oracle)"
ERASE_WAYS = (UNEDITED, "refinement", "replacement", "both", "both + prior", ANCHOR)


def time_table(world: World, kinds: Sequence[str], seeds: int) -> tuple[list[dict], Tensor]:
    """Rows of the first table, and the first pictures of source prompts before and after."""
    ways = {
        "unedited (baseline)": None,
        "TIME": {"carry": 0.0, "with_padding": True},
        CARRIED: {"carry": 0.3, "with_padding": False},
        "UCE vector": "uce",
        "destination prompt (oracle)": "oracle",
    }
    rows, shown = [], []
    for name, way in ways.items():
        found: dict[str, list[Tensor]] = {}
        for kind in kinds:
            one = _assumption(world, kind, way, seeds)
            shown.append(one.pop("shown")[:1])
            for key, values in one.items():
                found.setdefault(key, []).append(values)
        figures = {key: share(torch.cat(values)) for key, values in found.items()}
        general, specific = figures["generality"], figures["specificity"]
        both = 2 * general * specific / (general + specific) if general + specific else 0.0
        order = ("efficacy", "generality", "synonyms", "specificity")
        rows.append(
            {
                "way": name,
                **{key: figures[key] for key in order},
                "F1": round(both, 1),
                "kind": figures["kind"],
                "pictures": sum(len(values) for values in found["kind"]),
            }
        )
    return rows, torch.cat(shown)


def _assumption(world: World, kind: str, way: Any, seeds: int) -> dict[str, Tensor]:
    old, new = KINDS[kind].usual_colors[0], NEW_COLORS[kind]
    model = world.model
    if way == "uce":
        # Of the steps 1 to 4, and of colours alone or with the kind, the best.
        attributes = f"{old} {kind}", f"{new} {kind}"
        asked = Debiasing(kind, attributes, (1.0, 0.0), (0.0, 1.0), step=2.0)
        constraints = debias_constraints(world.encode, [asked])
        model = world.edited(model, constraints, UCE_RIDGE, kind)
    elif isinstance(way, dict):
        edit = f"a {kind}", f"a {new} {kind}"
        constraints = time_constraints(world.encode, *edit, **way)
        prior = preserve((), 1.0, world.statistics, 30.0) if way["carry"] else None
        model = world.edited(model, constraints, RIDGE, kind, prior)
    said = f"{new} " if way == "oracle" else ""
    synonym = KINDS[kind].words[-1]
    others = [k for k in CLASS_NAMES if k != kind and KINDS[k].usual_colors[0] not in (old, new)][
        :4
    ]
    some = max(1, seeds // 2)
    groups = {
        "efficacy": ([SOURCE.format(said + kind)] * seeds, kind),
        "generality": ([text.format(said + kind) for text in RELATED for _ in range(some)], kind),
        "synonyms": ([text.format(said + synonym) for text in RELATED for _ in range(some)], kind),
    }
    if synonym == kind:
        del groups["synonyms"]
    result: dict[str, list[Tensor]] = {"kind": []}
    index = CLASS_NAMES.index
    before, after = COLOR_NAMES.index(old), COLOR_NAMES.index(new)
    shown = None
    for at, (name, (prompts, _)) in enumerate(groups.items()):
        drawn = world.draw(model, prompts, seed=100 + at)
        shown = drawn.pictures if shown is None else shown
        result[name] = [drawn.rather("color", after, before)]
        result["kind"].append(drawn.shown("kind", index(kind)))
    result["specificity"] = []
    drawn = world.draw(model, [SOURCE.format(o) for o in others for _ in range(some)], seed=200)
    for at, other in enumerate(others):
        part = drawn.part(at * some, (at + 1) * some)
        usual = COLOR_NAMES.index(KINDS[other].usual_colors[0])
        result["specificity"].append(part.rather("color", usual, after))
        result["kind"].append(part.shown("kind", index(other)))
    found = {name: torch.cat(values) for name, values in result.items()}
    return {**found, "shown": shown}


def erase_constraints(world: World, count: int, method: str) -> Constraints:
    """All constraints of one set of concepts, to be met in one solve."""
    kinds, scenes = ERASED_SETS[count]
    parts = []
    for words, sentences in (
        (kinds, sentences_known_to(world.clip)),
        (scenes, SCENE_SENTENCES),
    ):
        erasures = [Erasure(word) for word in words]
        if erasures and method != "replacement":
            parts.append(refinement_constraints(world.encode, erasures, sentences))
        if erasures and method != "refinement":
            parts.append(replacement_constraints(world.encode, erasures, sentences))
    return Constraints.join(parts)


def erase_table(
    world: World, counts: Sequence[int], seeds: int
) -> tuple[list[dict[str, Any]], Tensor]:
    """Rows of the second table, and pictures of all kinds before and after."""
    kept = preserve((), 1.0, world.statistics, PRIOR)
    rows, shown = [], []
    for count in counts:
        for method in ERASE_WAYS:
            model = world.model
            if method not in (UNEDITED, ANCHOR):
                constraints = erase_constraints(world, count, method.split(" ")[0])
                prior = kept if "prior" in method else None
                model = world.edited(model, constraints, UCE_RIDGE, method, prior)
            row, pictures = _erased(world, model, count, seeds, by_anchor=method == ANCHOR)
            rows.append({"concepts": count, "way": method, **row})
            shown.append(pictures)
    return rows, torch.cat(shown)


def _erased(
    world: World, model: Any, count: int, seeds: int, by_anchor: bool
) -> tuple[dict[str, Any], Tensor]:
    kinds, scenes = ERASED_SETS[count]

    def said(word: str) -> str:
        return GENERIC_ANCHOR if by_anchor else word

    def accuracy(words: Sequence[tuple[str, str]], seed: int) -> tuple[Tensor, Tensor]:
        prompts = [SOURCE.format(word) for word, _ in words for _ in range(seeds)]
        drawn = world.draw(model, prompts, seed)
        right = [
            drawn.part(at * seeds, (at + 1) * seeds).shown("kind", CLASS_NAMES.index(kind))
            for at, (_, kind) in enumerate(words)
        ]
        return torch.cat(right), drawn.pictures[::seeds]

    synonyms = [(said(KINDS[k].words[-1]), k) for k in kinds if len(KINDS[k].words) > 1]
    unrelated = [(k, k) for k in CLASS_NAMES if k not in kinds]
    erased, first = accuracy([(said(kind), kind) for kind in kinds], 300)
    related, _ = accuracy(synonyms, 301)
    other, second = accuracy(unrelated, 302)
    if scenes:
        prompts = [
            "a house " + SCENE_PHRASES[scene].replace(scene, said(scene))
            for scene in scenes
            for _ in range(seeds)
        ]
        drawn = world.draw(model, prompts, 303)
        for at, scene in enumerate(scenes):
            part = drawn.part(at * seeds, (at + 1) * seeds)
            erased = torch.cat([erased, part.shown("scene", SCENES.index(scene))])
    figures = {"erased": share(erased), "synonyms": share(related), "unrelated": share(other)}
    terms = (1 - figures["erased"] / 100, figures["unrelated"] / 100, 1 - figures["synonyms"] / 100)
    harmonic = 3 / sum(1 / term for term in terms) if min(terms) > 0 else 0.0
    pictures = len(erased) + len(related) + len(other)
    row = {**figures, "H_o": round(100 * harmonic, 1), "pictures": pictures}
    return row, torch.cat([first, second])


def debias_table(world: World, pictures: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of the third table: shares of two colours after each edit."""
    concept, attributes = "mug", ("white", "blue")
    white, blue = (COLOR_NAMES.index(name) for name in attributes)
    rows, model = [], world.model
    counted: tuple[Counted, ...] = ()
    for turn in range(rounds + 1):
        drawn = world.draw(model, [SOURCE.format(concept)] * pictures, seed=400)
        first = float(drawn.rather("color", white, blue).float().mean())
        kind = share(drawn.shown("kind", CLASS_NAMES.index(concept)))
        rows.append(
            {
                "edits": turn,
                "rather white": round(100 * first, 1),
                "rather blue": round(100 * (1 - first), 1),
                "wanted": "50 / 50",
                "kind": kind,
                "pictures": pictures,
            }
        )
        if turn == rounds or first == 0.5:
            break
        shares = first, 1 - first
        asked = Debiasing(concept, attributes, shares, step=0.5, earlier=counted)
        constraints = debias_constraints(world.encode, [asked])
        model = world.edited(model, constraints, UCE_RIDGE, f"turn {turn}")
        counted = (*counted, Counted(shares, asked.pushes))
    return rows


def main() -> None:
    """Measure, print, save figures and grids."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4, help="pictures for each prompt")
    parser.add_argument("--kinds", nargs="+", choices=CLASS_NAMES, default=list(CLASS_NAMES))
    parser.add_argument("--counts", nargs="+", type=int, choices=list(ERASED_SETS), default=None)
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    counts = options.counts or list(ERASED_SETS)
    world = World()
    times, time_pictures = time_table(world, options.kinds, options.seeds)
    print_table(times)
    erased, erase_pictures = erase_table(world, counts, options.seeds)
    print_table(erased)
    debiased = debias_table(world, 8 * options.seeds, rounds=4)
    print_table(debiased)
    if options.no_save:
        return
    rows = [
        *({"table": "assumption", **row} for row in times),
        *({"table": "erase", **row} for row in erased),
        *({"table": "debias", **row} for row in debiased),
    ]
    settings = {
        "seeds": options.seeds,
        "kinds": options.kinds,
        "counts": counts,
        "source": SOURCE,
        "related": RELATED,
        "new_colors": NEW_COLORS,
        "time_ridge": RIDGE,
        "uce_ridge": UCE_RIDGE,
        "prior": PRIOR,
    }
    print(write_results("edit", settings, rows))
    sheet(time_pictures, len(options.kinds), scale=2).save(RESULTS / "edit_assumptions.png")
    sheet(erase_pictures, len(CLASS_NAMES), scale=2).save(RESULTS / "edit_erased.png")


if __name__ == "__main__":
    main()
