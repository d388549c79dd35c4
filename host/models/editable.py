"""Which models closed-form edits act on, and in which of two ways."""

from __future__ import annotations

from comfy.model_base import BaseModel

from .families import Family, UnsupportedModelError, family_of, supported_list
from .networks import ANIMA, COSMOS_PREDICT2, LTXV, PIXART, UNET, WAN
from .text_entries import TextEntry, entries_list, entry_of
from .unsupported import no_edits

EDITED = (UNET, COSMOS_PREDICT2, ANIMA, WAN, PIXART, LTXV)
"""Networks whose keys and values read the same encodings in every layer and at every step."""


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
    if family.network not in EDITED:
        raise no_edits(model, works, conceptual=True)
    return family
