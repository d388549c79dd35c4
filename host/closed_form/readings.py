"""What of a model reads text encodings, and how prompts are encoded for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ...perfusion.closed_form.even_sample import Rows
from ...perfusion.text.encoded_prompt import EncodedPrompt
from ..models.editable import edited_as
from ..models.families import Family, UnsupportedModelError, check_clip, cross_attentions
from ..models.networks import UNET, CrossAttention, FusedPart
from ..models.text_entries import TextEntry
from ..text.prompt_streams import Stream, family_stream, streams_of
from .between import network_at, norm_at
from .prompts import PromptEncoder
from .stored_weights import PREFIX
from .stream_prompts import Conditionings, StreamEncoder


class Encoder(Protocol):
    """Encodes prompts in the way that conditions the model to be edited."""

    def __call__(self, prompts: Sequence[str]) -> list[EncodedPrompt]:
        """The encoded prompts."""
        ...

    def stream(self, prompts: Iterable[str]) -> Iterator[EncodedPrompt]:
        """The encoded prompts one after the other."""
        ...


@dataclass(frozen=True, eq=False)
class Reading:
    """Projections that read the same encodings.

    Attributes:
        keys: of their weights in the model.
        width: D, of the encodings they read.
        encoders: one for each part of a conditioning that they read.
        first_row: of the weights, from which on they are edited: above 0 for the values alone of
            maps that make keys and values.
        behind: path of what the encodings pass before they are read, None for nothing.
    """

    keys: tuple[str, ...]
    width: int
    encoders: tuple[Encoder, ...]
    first_row: int = 0
    behind: str | None = None


@dataclass(frozen=True, eq=False)
class TextSide:
    """All that reads text in a model.

    Attributes:
        label: the model as a person knows it.
        readings: projections by what they read.
        sentences: of words that the text encoder knows, when it does not know everyday language.
        beside: what else tells the model of the text and is not edited, empty for nothing.
    """

    label: str
    readings: tuple[Reading, ...]
    sentences: tuple[str, ...] = ()
    beside: str = ""


def text_side(model: ModelPatcher, clip: CLIP, layers: str, with_to_k: bool) -> TextSide:
    """What of a MODEL to edit, and a CLIP's encoders for it.

    Args:
        model: the MODEL, with its patches.
        clip: the CLIP loaded together with it.
        layers: parts of layer names separated by commas; empty for all layers.
        with_to_k: keys besides values.

    Raises:
        UnsupportedModelError: for a model that closed-form edits cannot act on, and for the CLIP
            of another one.
        ValueError: when no layer's name contains any of the given parts, and for values alone
            where keys and values read one map.
    """
    kind = edited_as(model.model)
    if isinstance(kind, TextEntry):
        return _entry_side(model, clip, kind, layers, with_to_k)
    check_clip(clip, kind)
    return _family_side(model, clip, kind, layers, with_to_k)


def chosen(names: Sequence[str], layers: str) -> list[str]:
    """The names that contain one of some parts separated by commas; all for no part.

    Raises:
        ValueError: when none does.
    """
    parts = [part.strip() for part in layers.split(",") if part.strip()]
    found = [name for name in names if not parts or any(part in name for part in parts)]
    if not found:
        raise ValueError(
            f"no cross-attention layer's name contains {' or '.join(map(repr, parts))}, so nothing "
            f"would be edited; the layers are called {names[0]}, ... {names[-1]}"
        )
    return found


def _family_side(
    model: ModelPatcher, clip: CLIP, family: Family, layers: str, with_to_k: bool
) -> TextSide:
    known = {layer.name: layer for layer in cross_attentions(model.model)}
    names = chosen(list(known), layers)
    keys, first_row = _keys(family, [known[name] for name in names], with_to_k)
    entry = family.network.entry
    reading = Reading(
        keys,
        known[names[0]].input_width,
        (_family_encoder(model, clip, family),),
        first_row,
        entry,
    )
    return TextSide(family.label, (reading,), family.words.sentences if family.words else ())


def _keys(
    family: Family, layers: Sequence[CrossAttention], with_to_k: bool
) -> tuple[tuple[str, ...], int]:
    *_, values = parts = family.network.projections
    made_together = layers[0].to_v if isinstance(layers[0].to_v, FusedPart) else None
    parts = parts if with_to_k else (values,)
    keys = tuple(f"{PREFIX}{layer.name}.{part}.weight" for layer in layers for part in parts)
    return keys, 0 if with_to_k or made_together is None else made_together.start


def _family_encoder(model: ModelPatcher, clip: CLIP, family: Family) -> Encoder:
    if family.network is UNET:
        return PromptEncoder(clip)
    entry = family.network.entry
    between = None if entry is None else network_at(model, entry)
    return StreamEncoder(Conditionings(clip), family_stream(family, model), between)


def _entry_side(
    model: ModelPatcher, clip: CLIP, entry: TextEntry, layers: str, with_to_k: bool
) -> TextSide:
    network: Any = model.model.diffusion_model
    if not with_to_k:
        raise ValueError(
            f"{entry.label} reads the text through one map that keys and values share; switch "
            "with_to_k on"
        )
    streams = {stream.name: stream for stream in streams_of(clip)}
    known = {name.partition(".")[0] for name in streams}
    if not streams or not known <= set(entry.streams):
        raise UnsupportedModelError(
            f"the CLIP does not belong to {entry.label}: expected encodings of "
            f"{' and '.join(entry.streams)}, found {' and '.join(sorted(known)) or 'none'}. "
            "Connect the CLIP that was loaded together with the model."
        )
    norm = None if entry.norm is None else norm_at(model, entry.norm)
    conditionings = Conditionings(clip)
    linears = {linear.path: linear for linear in entry.linears(network)}
    readings: dict[tuple[str, ...], list[str]] = {}
    for path in chosen(list(linears), layers):
        wanted = linears[path].streams
        names = tuple(streams) if wanted is None else tuple(n for n in wanted if n in streams)
        if names:
            readings.setdefault(names, []).append(path)
    if not readings:
        raise UnsupportedModelError(
            f"no chosen layer of {entry.label} reads what this CLIP gives "
            f"({', '.join(sorted(known))}); load its other text encoders too"
        )
    return TextSide(
        entry.label,
        tuple(
            _entry_reading(network, paths, [streams[name] for name in names], conditionings, norm)
            for names, paths in readings.items()
        ),
        beside=entry.beside,
    )


def _entry_reading(
    network: Any,
    paths: Sequence[str],
    streams: Sequence[Stream],
    known: Conditionings,
    norm: Callable[[Rows], Rows] | None,
) -> Reading:
    keys = tuple(f"{PREFIX}{path}.weight" for path in paths)
    width = int(network.get_submodule(paths[0]).in_features)
    return Reading(keys, width, tuple(StreamEncoder(known, stream, norm) for stream in streams))
