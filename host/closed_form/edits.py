"""The editing nodes' work: prompts in, an edited MODEL and its report out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...perfusion.closed_form.mace import (
    SENTENCES,
    check_erasures,
    parse_erasures,
    refinement_constraints,
    replacement_constraints,
)
from ...perfusion.closed_form.preserve import Preserved, preserve
from ...perfusion.closed_form.solver import Constraints
from ...perfusion.closed_form.time import time_constraints
from ...perfusion.closed_form.uce import Debiasing, debias_constraints
from ...perfusion.gated.covariance import Covariance
from .prompts import PromptEncoder
from .weight_patches import EditSettings, apply_edit, check_pair

REFINEMENT, REPLACEMENT, BOTH = "refinement", "replacement", "both"


def edit_assumption(
    model: Any,
    clip: Any,
    source: str,
    destination: str,
    augment: bool,
    carry: float,
    with_padding: bool,
    settings: EditSettings,
    preserved: Preserved | None,
) -> tuple[Any, str]:
    """TIME's edit: a MODEL for which the source says what the destination says, and the report."""
    check_pair(model, clip)
    encode = PromptEncoder(clip)
    constraints = time_constraints(encode, source, destination, augment, carry, with_padding)
    return _apply(model, constraints, settings, f"{source} -> {destination}", preserved)


def erase_concepts(
    model: Any,
    clip: Any,
    concepts: str,
    method: str,
    sentences: Sequence[str],
    settings: EditSettings,
    preserved: Preserved | None,
) -> tuple[Any, str]:
    """Erase phrases, one `target -> anchor` a line, all in one solve; the MODEL and the report.

    `method`: "refinement" (MACE's: the words around), "replacement" (UCE's: the words themselves)
    or "both". Without sentences the built-in ones are used.
    """
    check_pair(model, clip)
    erasures = parse_erasures(concepts)
    encode = PromptEncoder(clip)
    check_erasures(encode, erasures, preserved.texts if preserved else ())
    chosen = tuple(sentences) or SENTENCES
    parts: list[Constraints] = []
    if method in (REFINEMENT, BOTH):
        parts.append(refinement_constraints(encode, erasures, chosen))
    if method in (REPLACEMENT, BOTH):
        parts.append(replacement_constraints(encode, erasures, chosen))
    label = f"erase ({method}) " + ", ".join(f"{e.target} -> {e.anchor}" for e in erasures)
    return _apply(model, Constraints.join(parts), settings, label, preserved)


def debias(
    model: Any,
    clip: Any,
    debiasings: Sequence[Debiasing],
    settings: EditSettings,
    preserved: Preserved | None,
) -> tuple[Any, str]:
    """UCE's debiasing of concepts towards wanted shares of attributes; the MODEL and the report."""
    check_pair(model, clip)
    if not debiasings:
        raise ValueError("expected at least one concept to debias, found none; write one a line")
    constraints = debias_constraints(PromptEncoder(clip), debiasings)
    label = "debias " + ", ".join(each.concept for each in debiasings)
    return _apply(model, constraints, settings, label, preserved)


def preserve_prompts(
    clip: Any,
    prompts: Sequence[str],
    weight: float,
    covariance: Covariance | None,
    covariance_weight: float,
) -> Preserved:
    """Prompts and statistics that edits shall leave as they are.

    Raises:
        ValueError: for neither prompts nor statistics, and for statistics of another text encoder.
    """
    encode = PromptEncoder(clip)
    if covariance is not None and covariance.encoder_hash != encode.text.digest():
        raise ValueError(
            "the covariance was measured with another text encoder (or another clip skip or LoRA "
            "on it); measure it again with this CLIP"
        )
    return preserve(encode(prompts), weight, covariance, covariance_weight)


def _apply(
    model: Any,
    constraints: Constraints,
    settings: EditSettings,
    label: str,
    preserved: Preserved | None,
) -> tuple[Any, str]:
    patched, report = apply_edit(model, constraints, settings, label, preserved)
    return patched, f"{label}\n{report.text()}\nstrength {settings.strength:g}"
