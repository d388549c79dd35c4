"""The editing nodes' work: prompts in, an edited MODEL and its report out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ...perfusion.closed_form.constraints import Constraints
from ...perfusion.closed_form.counts import Counted
from ...perfusion.closed_form.erasure import check_erasures, parse_erasures
from ...perfusion.closed_form.mace import SENTENCES, refinement_constraints
from ...perfusion.closed_form.preserve import Preserved, preserve
from ...perfusion.closed_form.time import time_constraints
from ...perfusion.closed_form.uce import Debiasing, debias_constraints, replacement_constraints
from ...perfusion.gated.covariance import Covariance
from ..text.text_encoders import TextEncoders
from .readings import Encoder, Reading, TextSide, text_side
from .weight_patches import AppliedEdit, EditSettings, Task, applied_edits, apply_edit

REFINEMENT, REPLACEMENT, BOTH = "refinement", "replacement", "both"


Ask = Callable[[Encoder], Iterable[Constraints]]


@dataclass(frozen=True)
class ToPreserve:
    """What edits shall leave as it is, whatever the model makes of it.

    Attributes:
        texts: prompts.
        weight: how much each of their tokens counts beside an edited one's 1.
        covariance: statistics of captions.
        covariance_weight: as how many tokens they count.
    """

    texts: tuple[str, ...]
    weight: float = 1.0
    covariance: Covariance | None = None
    covariance_weight: float = 0.0

    def for_reading(self, reading: Reading) -> Preserved:
        """The same in the encodings that some projections read.

        Raises:
            ValueError: for statistics of encodings that pass something before they are read.
        """
        if self.covariance is not None and reading.behind is not None:
            raise ValueError(
                "the covariance is of what the model is called with, and this model sends that "
                f"through `{reading.behind}` before its keys and values read it; preserve prompts "
                "instead: write some captions into Preserve, one a line"
            )
        found = (each for encode in reading.encoders for each in encode.stream(self.texts))
        return preserve(found, self.weight, self.covariance, self.covariance_weight)


def edit_assumption(
    model: ModelPatcher,
    clip: CLIP,
    source: str,
    destination: str,
    augment: bool,
    carry: float,
    with_padding: bool,
    settings: EditSettings,
    preserved: ToPreserve | None,
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
    side = text_side(model, clip, settings.layers, settings.with_to_k)

    def ask(encode: Encoder) -> Iterator[Constraints]:
        yield time_constraints(encode, source, destination, augment, carry, with_padding)

    return _apply(model, side, ask, settings, f"{source} -> {destination}", preserved)


def erase_concepts(
    model: ModelPatcher,
    clip: CLIP,
    concepts: str,
    method: str,
    sentences: Sequence[str],
    settings: EditSettings,
    preserved: ToPreserve | None,
) -> tuple[ModelPatcher, str]:
    """Erase phrases, all in one solve; the MODEL and the report.

    Args:
        model: the MODEL to edit.
        clip: the CLIP loaded together with it.
        concepts: one `target -> anchor` a line.
        method: "refinement" (MACE's: the words around), "replacement" (UCE's: the words themselves)
            or "both".
        sentences: to erase in, each with one {}; built-in ones of words that the text encoder
            knows when there is none.
        settings: how to solve, and where.
        preserved: what to leave as it is.

    Raises:
        ValueError: for lines that contradict themselves, each other, or what is preserved.
    """
    side = text_side(model, clip, settings.layers, settings.with_to_k)
    erasures = parse_erasures(concepts)
    chosen = tuple(sentences) or side.sentences or SENTENCES
    kept = preserved.texts if preserved else ()

    def ask(encode: Encoder) -> Iterator[Constraints]:
        check_erasures(encode, erasures, kept)
        # One erasure after the other: all encodings together would be gigabytes for many of them.
        for erasure in erasures:
            if method in (REFINEMENT, BOTH):
                yield refinement_constraints(encode, [erasure], chosen)
            if method in (REPLACEMENT, BOTH):
                yield replacement_constraints(encode, [erasure], chosen)

    label = f"erase ({method}) " + ", ".join(f"{e.target} -> {e.anchor}" for e in erasures)
    return _apply(model, side, ask, settings, label, preserved)


def debias(
    model: ModelPatcher,
    clip: CLIP,
    debiasings: Sequence[Debiasing],
    settings: EditSettings,
    preserved: ToPreserve | None,
) -> tuple[ModelPatcher, str]:
    """UCE's debiasing of concepts towards wanted shares of attributes; the MODEL and the report.

    What was counted for the edits that the MODEL carries already, for the same words, shortens the
    step (`perfusion.closed_form.counts`).

    Raises:
        ValueError: for no concept, and for shares that are met already.
    """
    side = text_side(model, clip, settings.layers, settings.with_to_k)
    if not debiasings:
        raise ValueError("expected at least one concept to debias, found none; write one a line")
    carried = () if settings.restart else applied_edits(model)
    asked = tuple(replace(each, earlier=_counted(carried, each)) for each in debiasings)

    def ask(encode: Encoder) -> Iterator[Constraints]:
        yield debias_constraints(encode, asked)

    label = "debias " + ", ".join(each.concept for each in asked)
    patched, report = _apply(model, side, ask, settings, label, preserved, asked)
    return patched, "\n".join([report, *(_pushed(each) for each in asked)])


def _counted(carried: Sequence[AppliedEdit], asked: Debiasing) -> tuple[Counted, ...]:
    return tuple(
        Counted(past.measured, tuple(edit.strength * push for push in past.pushes))
        for edit in carried
        for past in edit.debiased
        if (past.concept, past.attributes) == (asked.concept, asked.attributes)
    )


def _pushed(asked: Debiasing) -> str:
    pairs = zip(asked.attributes, asked.pushes, strict=True)
    pushed = ", ".join(f"{push:+.3g} {attribute}" for attribute, push in pairs)
    plain = replace(asked, earlier=()).pushes
    shorter = " (shortened by earlier counts)" if asked.pushes != plain else ""
    return f"{asked.concept}: {pushed}{shorter}"


def preserve_prompts(
    clip: CLIP,
    prompts: Sequence[str],
    weight: float,
    covariance: Covariance | None,
    covariance_weight: float,
) -> ToPreserve:
    """Prompts and statistics that edits shall leave as they are; see `preserve`.

    Raises:
        ValueError: for neither prompts nor statistics, for negative weights, and for statistics of
            another text encoder.
    """
    if covariance is None and not prompts:
        raise ValueError("expected prompts or statistics to preserve, found neither")
    if covariance is not None and covariance.encoder_hash != TextEncoders(clip).digest():
        raise ValueError(
            "the covariance was measured with another text encoder (or another clip skip or LoRA "
            "on it); measure it again with this CLIP"
        )
    return ToPreserve(tuple(prompts), weight, covariance, covariance_weight)


def _apply(
    model: ModelPatcher,
    side: TextSide,
    ask: Ask,
    settings: EditSettings,
    label: str,
    preserved: ToPreserve | None,
    debiased: tuple[Debiasing, ...] = (),
) -> tuple[ModelPatcher, str]:
    tasks = (
        Task(
            reading.keys,
            reading.width,
            chain.from_iterable(ask(encode) for encode in reading.encoders),
            preserved.for_reading(reading) if preserved else None,
            reading.first_row,
        )
        for reading in side.readings
    )
    patched, report = apply_edit(model, tasks, settings, label, debiased)
    lines = [label, report.text(), f"strength {settings.strength:g}"]
    if side.beside:
        lines.append(f"not edited: {side.label} also has {side.beside}")
    return patched, "\n".join(lines)
