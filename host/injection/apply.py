"""Putting concepts on a model and its text encoder; clones carry them along."""

from __future__ import annotations

from collections.abc import Sequence

from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ...perfusion.concept.concept import Concept
from ...perfusion.gated.rank_one import Basis, combine
from ...perfusion.gated.twin_lock import combine_twins
from ..interface.messages import warn
from ..models.families import Family, check_clip, cross_attentions, family_named, family_of
from ..text.placeholders import PlaceholderError, with_placeholders
from ..text.text_encoders import clip_digest
from ..text.twin_encoder import with_twins
from .agenda import Agenda
from .injection import KEY, ConceptInjection, set_injection
from .key_locks import KeyLock

_LOCK = f"{KEY}_key_lock"


def apply_concepts(
    model: ModelPatcher,
    clip: CLIP,
    concepts: Sequence[Concept],
    key_lock: KeyLock = "local",
) -> tuple[ModelPatcher, CLIP]:
    """A clone of a ModelPatcher and of a CLIP that know these concepts, besides earlier ones.

    Applying twice equals applying once with both lists. Without concepts, or with all strengths
    0, the model stays unedited; placeholders are served in any case. With the local key lock a
    concept's own token has its superclass's keys; with the global one all keys are those of the
    prompt with the superclass words in place of the placeholders. With twin lock the model reads
    that prompt altogether, and the concepts speak in values only, where they are named (method
    section 1).

    Raises:
        ValueError: for a concept of another family or layer list, a placeholder in use twice,
            parallel concepts, a block the model does not have, and for concepts that cannot be
            applied with this key lock.
        UnsupportedModelError: for a model or CLIP that cannot be edited.
    """
    family = family_of(model.model)
    check_clip(clip, family)
    for concept in concepts:
        check_concept(concept, model.model, family)
    applied = applied_concepts(model) + tuple(concepts)
    check_placeholders(applied)
    warn_of_another_encoder(clip, concepts)
    active = [concept for concept in applied if concept.gate.strength != 0]
    check_trained_lock(applied, key_lock)
    check_family_lock(family, key_lock)
    check_key_lock(model, active, key_lock)
    patched = model.clone()
    patched.set_attachments(KEY, applied)
    if active:
        patched.set_attachments(_LOCK, key_lock)
    twin_lock = key_lock == "twin"

    def together(acting: Sequence[Concept]) -> Basis:
        if twin_lock:
            return combine_twins([concept.twin_direction(family.parts) for concept in acting])
        return combine([concept.direction() for concept in acting])

    agenda = Agenda(active, [layer.name for layer in cross_attentions(model.model)], together)
    set_injection(patched, ConceptInjection(agenda, key_lock) if active else None)
    return patched, with_twins(with_placeholders(clip, concepts, twin_lock), concepts, twin_lock)


def applied_concepts(model: ModelPatcher) -> tuple[Concept, ...]:
    """The concepts a ModelPatcher carries, in the order they were applied."""
    return model.get_attachment(KEY) or ()


def check_placeholders(applied: Sequence[Concept]) -> None:
    """Make sure that every concept has a placeholder of its own.

    Raises:
        PlaceholderError: naming the word and the remedy.
    """
    seen: set[str] = set()
    for concept in applied:
        word = concept.placeholder.lower()
        if word in seen:
            raise PlaceholderError(
                f"the placeholder {concept.placeholder!r} is used by two of the concepts that are "
                "applied to this model; leave one out, or train one of them under another "
                "placeholder"
            )
        seen.add(word)


def warn_of_another_encoder(clip: CLIP, concepts: Sequence[Concept]) -> None:
    """Say so where a concept was trained with other encodings than this CLIP makes."""
    trained = {c.placeholder: c.metadata.get("encoder_hash") for c in concepts}
    if not any(trained.values()):
        return
    here = clip_digest(clip)
    words = [word for word, digest in trained.items() if digest not in (None, "", here)]
    if words:
        warn(
            f"{', '.join(words)}: trained with another text encoder than the connected one "
            "(another clip skip, another checkpoint, or a LoRA on one of the two), so gates may "
            "open too much or too little; connect the CLIP it was trained with"
        )


def check_trained_lock(applied: Sequence[Concept], key_lock: KeyLock) -> None:
    """Make sure that concepts trained with twin lock are applied with it.

    Raises:
        ValueError: naming the concept and the remedy.
    """
    for concept in applied:
        if concept.twin_locked and key_lock != "twin":
            raise ValueError(
                f"concept {concept.placeholder!r} was trained with twin lock, in prompts that read "
                f"as its superclass {concept.superclass!r}, and means nothing with {key_lock} key "
                "lock; choose key_lock twin"
            )


def check_family_lock(family: Family, key_lock: KeyLock) -> None:
    """Make sure that a family's keys can be locked this way.

    Raises:
        ValueError: naming the family and the remedy.
    """
    if family.network.entry is not None and key_lock != "twin":
        raise ValueError(
            f"{family.label} sends the text encodings through its {family.network.entry} before "
            f"the keys and values read them, where {key_lock} key lock has no place to subtract "
            "a concept's direction; choose key_lock twin"
        )


def check_key_lock(model: ModelPatcher, active: Sequence[Concept], key_lock: KeyLock) -> None:
    """Make sure that these concepts, some of them on the model already, can be locked this way.

    Raises:
        ValueError: naming the concept and the remedy.
    """
    former = model.get_attachment(_LOCK)
    if former not in (None, key_lock) and active:
        raise ValueError(
            f"the model carries concepts with {former} key lock; expected the same for those "
            f"applied after them, found {key_lock}; choose one for all Apply Concepts in a row"
        )
    if key_lock == "local":
        return
    for concept in active:
        if concept.o_k is not None:
            raise ValueError(
                f"concept {concept.placeholder!r} was trained with keys of its own, which a "
                f"{key_lock} key lock would replace; apply it with local key lock"
            )
    if key_lock == "twin":
        return
    plans = {(c.schedule.start, c.schedule.end, c.schedule.blocks) if c.schedule else None
             for c in active}  # fmt: skip
    if len(plans) > 1:
        raise ValueError(
            "with global key lock the keys are those of one second prompt, so all concepts must "
            f"act at the same time and place; found {len(plans)} different schedules; give all "
            "the same range and blocks, or use local key lock"
        )


def check_concept(concept: Concept, model: BaseModel, family: Family) -> None:
    """Make sure a concept was trained for this family and for these very layers.

    Raises:
        ValueError: naming both sides and the remedy.
    """
    if concept.family != family.name:
        trained = family_named(concept.family)
        raise ValueError(
            f"concept {concept.placeholder!r} was trained for "
            f"{trained.label if trained else repr(concept.family)}, the model is {family.label}; "
            "load a model of the concept's family or train the concept again on this model"
        )
    if concept.i.shape != (family.width,):
        raise ValueError(
            f"concept {concept.placeholder!r} was trained on encodings {tuple(concept.i.shape)}, "
            f"the model reads {family.width} wide ones; train the concept again on this model"
        )
    layers = {layer.name: layer.value_width for layer in cross_attentions(model)}
    missing = [name for name in layers if name not in concept.layers]
    surplus = [name for name in concept.layers if name not in layers]
    if missing or surplus:
        odd = missing[0] if missing else surplus[0]
        raise ValueError(
            f"concept {concept.placeholder!r} covers {len(concept.layers)} cross-attention layers, "
            f"the model has {len(layers)} ({odd!r} is only in the "
            f"{'model' if missing else 'concept'}); it was trained on another variant of "
            f"{family.label}, train it again on this model"
        )
    for name, width in layers.items():
        if concept.layers[name] != width:
            raise ValueError(
                f"concept {concept.placeholder!r} has {concept.layers[name]} values for layer "
                f"{name!r}, the model has {width}; train the concept again on this model"
            )
