"""Which models closed-form edits act on, and in which of two ways."""

from __future__ import annotations

from comfy.model_base import BaseModel

from .families import Family, UnsupportedModelError, cross_attentions, family_of, supported_list
from .text_entries import TextEntry, entries_list, entry_of
from .unsupported import no_edits


def edited_as(model: BaseModel) -> TextEntry | Family:
    """What a ComfyUI BaseModel is to closed-form edits.

    A `TextEntry` is edited where the text enters it, a family in every key and value of the text.

    Raises:
        UnsupportedModelError: for a model they cannot act on, naming it, what works on it and what
            they act on.
    """
    entry = entry_of(model)
    if entry is not None:
        return entry
    works = f"{supported_list()}, {entries_list()}"
    try:
        family = family_of(model)
    except UnsupportedModelError as error:
        raise no_edits(model, works, conceptual=False) from error
    # What passes a network of its own first is not what the maps read.
    if family.network.entry is not None or not _separate_maps(model):
        raise no_edits(model, works, conceptual=True)
    return family


def _separate_maps(model: BaseModel) -> bool:
    """Whether keys and values have maps of their own under the names that edits look for."""
    for layer in cross_attentions(model):
        attention = model.diffusion_model.get_submodule(layer.name)
        if getattr(attention, "to_k", None) is not layer.to_k:
            return False
        if getattr(attention, "to_v", None) is not layer.to_v:
            return False
    return True
