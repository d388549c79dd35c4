"""What a concept says about itself: the texts in its file, and all of it for a person to read.

The keys ``modelspec.*`` are those of the ModelSpec standard 1.0 for adapters
(https://github.com/Stability-AI/ModelSpec), which other programs show in their lists of models.
Two of the standard's optional keys are left out on purpose: ``date``, since training twice with
one seed gives one and the same file, byte for byte, and ``hash_sha256``, for which a file of
32 kB has no room.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping

from ..gated.gate_schedule import GateSchedule
from .concept import Concept

PACK_VERSION = "0.1.0"
THUMBNAIL = "modelspec.thumbnail"
# What the standard calls the models a family's concepts are made for.
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl_refiner": "stable-diffusion-xl-v1-refiner",
}
# How much of a file's own texts is shown: a stranger may have written them.
_SHOWN_CHARACTERS = 300
_SHOWN_KEYS = 40
_KNOWN = (
    ("covariance_hash", "covariance"),
    ("encoder_hash", "text encoder"),
    ("images_hash", "training images"),
    ("made_with", "made with"),
)


def modelspec(concept: Concept) -> dict[str, str]:
    """The standard's keys that follow from the concept; a title may be given in its metadata."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{ARCHITECTURES.get(concept.family, concept.family)}/perfusion",
        "modelspec.implementation": "perfusion",
        "modelspec.title": concept.metadata.get("modelspec.title", concept.placeholder),
        "modelspec.trigger_phrase": concept.placeholder,
    }


def with_origin(concept: Concept, versions: Mapping[str, str], images_hash: str = "") -> Concept:
    """The same concept saying what made it, and of which pictures.

    Args:
        concept: the concept.
        versions: those of the host's programs, such as {"ComfyUI": "0.30.0"}; the pack's own
            comes first.
        images_hash: names the training pictures.
    """
    parts = {"perfusion": PACK_VERSION, **versions}
    origin = {"made_with": ", ".join(f"{name} {version}" for name, version in parts.items())}
    if images_hash:
        origin["images_hash"] = images_hash
    return concept.with_metadata(origin)


def with_thumbnail(concept: Concept, url: str) -> Concept:
    """The same concept with a small picture, a ``data:image/...;base64,`` URL."""
    return concept.with_metadata({THUMBNAIL: url})


def describe(concept: Concept, thumbnail: str = "") -> str:
    """All a concept says about itself, for a person, one thing a line.

    Texts of the file are shown as one line of visible characters each and cut where they are very
    long; nothing in them is followed or run.

    Args:
        concept: the concept.
        thumbnail: what became of its picture, which takes a host to look at.
    """
    metadata = dict(concept.metadata)
    gate, trained = concept.gate, concept.train_gate
    lines = [
        f"trigger phrase: {concept.placeholder}",
        f"superclass: {concept.superclass}",
        f"family: {concept.family}, architecture {modelspec(concept)['modelspec.architecture']}",
        f"keys: {_keys(concept)}",
        f"gate: bias {gate.bias:g}, temperature {gate.temperature:g}, strength {gate.strength:g}",
        f"training gate: bias {trained.bias:g}, temperature {trained.temperature:g}",
    ]
    if concept.schedule is not None:
        lines.append(f"schedule, not kept in a file: {_schedule(concept.schedule)}")
    lines += _sizes(concept)
    lines += _training(metadata.pop("training", None))
    for key, name in _KNOWN:
        lines.append(f"{name}: {_visible(metadata.pop(key, 'not recorded'))}")
    if thumbnail:
        lines.append(f"thumbnail: {thumbnail}")
    metadata.pop(THUMBNAIL, None)
    others = [(key, metadata[key]) for key in sorted(metadata) if key not in _own(concept)]
    lines += [f"{_visible(key)}: {_visible(value)}" for key, value in others[:_SHOWN_KEYS]]
    if len(others) > _SHOWN_KEYS:
        lines.append(f"and {len(others) - _SHOWN_KEYS} more entries")
    return "\n".join(lines)


def _own(concept: Concept) -> set[str]:
    """Keys of the standard that repeat what the first lines have said."""
    return set(modelspec(concept)) - {"modelspec.title"}


def _keys(concept: Concept) -> str:
    if concept.o_k is not None:
        return "trained"
    if concept.twin_locked:
        return f"twin lock, prompts read as if they said {concept.superclass}"
    return f"locked to {concept.superclass}"


def _schedule(schedule: GateSchedule) -> str:
    (first, last), (cool, warm) = schedule.bias, schedule.temperature
    return (
        f"from {schedule.start:g} to {schedule.end:g} of the sampling, bias {first:g} to {last:g}, "
        f"temperature {cool:g} to {warm:g}, blocks {', '.join(schedule.blocks) or 'all'}"
    )


def _sizes(concept: Concept) -> list[str]:
    vectors = ", ".join(f"{name} ({v.shape[0]})" for name, v in concept.embeddings.items())
    layers = concept.layers
    widths = ", ".join(f"{count} of {width}" for width, count in Counter(layers.values()).items())
    names = list(layers)
    ends = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    numbers = sum(layers.values()) * (1 if concept.o_k is None else 2)
    numbers += sum(v.shape[0] for v in concept.embeddings.values()) + 3 * concept.i.shape[0]
    return [
        f"token vectors: {vectors}",
        f"encoding width: {concept.i.shape[0]}, energy {concept.energy:.6g}",
        f"layers: {len(layers)} (widths: {widths}), {ends}",
        f"size: {numbers} numbers, {2 * numbers / 1000:.1f} kB in half precision",
    ]


def _training(text: str | None) -> list[str]:
    """The settings training recorded; a text that is no JSON object is shown as it is."""
    if text is None:
        return ["training: not recorded"]
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        return [f"training: {_visible(text)}"]
    if not isinstance(settings, dict):
        return [f"training: {_visible(text)}"]
    seed = [f"seed: {_visible(str(settings.pop('seed')))}"] if "seed" in settings else []
    pairs = (f"{name} {value}" for name, value in settings.items())
    return [f"training: {_visible(', '.join(pairs), 4 * _SHOWN_CHARACTERS)}", *seed]


def _visible(text: str, limit: int = _SHOWN_CHARACTERS) -> str:
    """``text`` on one line, without characters that are not seen, cut to ``limit``."""
    words = " ".join(text[: 4 * limit].split())
    # Category C: control, format (which turns the direction of writing), surrogates, unassigned.
    shown = "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c)[0] == "C" else c for c in words
    )
    if len(shown) <= limit and len(text) <= 4 * limit:
        return shown
    return f"{shown[:limit]}... ({len(text)} characters)"
