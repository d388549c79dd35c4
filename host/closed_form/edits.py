"""The editing nodes' work: prompts in, an edited MODEL and its report out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ...perfusion.closed_form.constraints import Constraints
from ...perfusion.closed_form.erasure import Erasure, check_erasures, parse_erasures
from ...perfusion.closed_form.mace import SENTENCES, refinement_constraints
from ...perfusion.closed_form.preserve import Preserved, preserve
from ...perfusion.closed_form.time import time_constraints
from ...perfusion.closed_form.uce import Debiasing, debias_constraints, replacement_constraints
from ...perfusion.gated.covariance import Covariance
from .prompts import PromptEncoder
from .weight_patches import EditSettings, apply_edit, check_pair

REFINEMENT, REPLACEMENT, BOTH = "refinement", "replacement", "both"


def edit_assumption(
    model: ModelPatcher,
    clip: CLIP,
    source: str,
    destination: str,
    augment: bool,
    carry: float,
    with_padding: bool,
    settings: EditSettings,
    preserved: Preserved | None,
) -> tuple[ModelPatcher, str]:
    """TIME's edit: a MODEL for which the source says what the destination says, and the report.

    Args:
        model: the MODEL to edit.
        clip: the CLIP loaded together with it.
        source, destination, augment, carry, with_padding: as in `time_constraints`.
        settings: how to solve, and where.
        preserved: what to leave as it is.

    Raises:
        ValueError: for prompts that do not match, and for an edit that cannot be solved.
    """
    check_pair(model, clip)
    encode = PromptEncoder(clip)
    constraints = time_constraints(encode, source, destination, augment, carry, with_padding)
    return _apply(model, constraints, settings, f"{source} -> {destination}", preserved)


def erase_concepts(
    model: ModelPatcher,
    clip: CLIP,
    concepts: str,
    method: str,
    sentences: Sequence[str],
    settings: EditSettings,
    preserved: Preserved | None,
) -> tuple[ModelPatcher, str]:
    """Erase phrases, all in one solve; the MODEL and the report.

    Args:
        model: the MODEL to edit.
        clip: the CLIP loaded together with it.
        concepts: one `target -> anchor` a line.
        method: "refinement" (MACE's: the words around), "replacement" (UCE's: the words themselves)
            or "both".
        sentences: to erase in, each with one {}; the built-in ones when there is none.
        settings: how to solve, and where.
        preserved: what to leave as it is.

    Raises:
        ValueError: for lines that contradict themselves, each other, or what is preserved.
    """
    check_pair(model, clip)
    erasures = parse_erasures(concepts)
    encode = PromptEncoder(clip)
    check_erasures(encode, erasures, preserved.texts if preserved else ())
    parts = _erasing(encode, erasures, method, tuple(sentences) or SENTENCES)
    label = f"erase ({method}) " + ", ".join(f"{e.target} -> {e.anchor}" for e in erasures)
    return _apply(model, parts, settings, label, preserved)


def _erasing(
    encode: PromptEncoder, erasures: Sequence[Erasure], method: str, sentences: Sequence[str]
) -> Iterator[Constraints]:
    # One erasure after the other: all encodings together would be gigabytes for many of them.
    for erasure in erasures:
        if method in (REFINEMENT, BOTH):
            yield refinement_constraints(encode, [erasure], sentences)
        if method in (REPLACEMENT, BOTH):
            yield replacement_constraints(encode, [erasure], sentences)


def debias(
    model: ModelPatcher,
    clip: CLIP,
    debiasings: Sequence[Debiasing],
    settings: EditSettings,
    preserved: Preserved | None,
) -> tuple[ModelPatcher, str]:
    """UCE's debiasing of concepts towards wanted shares of attributes; the MODEL and the report.

    Raises:
        ValueError: for no concept, and for shares that are met already.
    """
    check_pair(model, clip)
    if not debiasings:
        raise ValueError("expected at least one concept to debias, found none; write one a line")
    constraints = debias_constraints(PromptEncoder(clip), debiasings)
    label = "debias " + ", ".join(each.concept for each in debiasings)
    return _apply(model, constraints, settings, label, preserved)


def preserve_prompts(
    clip: CLIP,
    prompts: Sequence[str],
    weight: float,
    covariance: Covariance | None,
    covariance_weight: float,
) -> Preserved:
    """Prompts and statistics that edits shall leave as they are; see `preserve`.

    Raises:
        ValueError: for neither prompts nor statistics, and for statistics of another text encoder.
    """
    encode = PromptEncoder(clip)
    if covariance is not None and covariance.encoder_hash != encode.text.digest():
        raise ValueError(
            "the covariance was measured with another text encoder (or another clip skip or LoRA "
            "on it); measure it again with this CLIP"
        )
    return preserve(encode.stream(prompts), weight, covariance, covariance_weight)


def _apply(
    model: ModelPatcher,
    constraints: Constraints | Iterable[Constraints],
    settings: EditSettings,
    label: str,
    preserved: Preserved | None,
) -> tuple[ModelPatcher, str]:
    patched, report = apply_edit(model, constraints, settings, label, preserved)
    return patched, f"{label}\n{report.text()}\nstrength {settings.strength:g}"
