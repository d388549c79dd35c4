"""Putting concepts on a model and its text encoder; clones carry them along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..perfusion.concept import Concept
from .families import Family, check_clip, cross_attentions, family_named, family_of
from .injection import KEY, ConceptInjection, set_injection
from .tokens import with_placeholders


def apply_concepts(model: Any, clip: Any, concepts: Sequence[Concept]) -> tuple[Any, Any]:
    """A clone of a ModelPatcher and of a CLIP that know these concepts, besides earlier ones.

    Applying twice equals applying once with both lists. Without concepts, or with all strengths
    0, the model stays unedited; placeholders are served in any case.

    Raises:
        ValueError: for a concept of another family or layer list, a placeholder in use twice,
            parallel concepts.
        UnsupportedModelError: for a model or CLIP that cannot be edited.
    """
    family = family_of(model.model)
    check_clip(clip, family)
    for concept in concepts:
        check_concept(concept, model.model, family)
    applied = applied_concepts(model) + tuple(concepts)
    active = [concept for concept in applied if concept.strength != 0]
    patched = model.clone()
    patched.set_attachments(KEY, applied)
    set_injection(patched, ConceptInjection(active) if active else None)
    return patched, with_placeholders(clip, concepts)


def applied_concepts(model: Any) -> tuple[Concept, ...]:
    """The concepts a ModelPatcher carries, in the order they were applied."""
    return model.get_attachment(KEY) or ()


def check_concept(concept: Concept, model: Any, family: Family) -> None:
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
