"""A personalised concept (its file: `concept_file`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from ..gated.gate import INFERENCE_GATE, TRAINING_GATE, Gate
from ..gated.gate_schedule import GateSchedule
from ..gated.rank_one import Direction
from ..gated.twin_lock import twin_direction
from ..shapes import Vector
from ..text.words import check_identifier, check_phrase, check_word

TrainedLock = Literal["local", "twin", "trained"]
TRAINED_LOCKS: tuple[TrainedLock, ...] = get_args(TrainedLock)
LAYER_LIMIT = 4096
THUMBNAIL_LIMIT = 2**20


@dataclass(frozen=True, eq=False)
class Concept:
    """What training a concept leaves behind.

    Attributes:
        family: the model family ("sd1", "sdxl", ...).
        placeholder: the word used in prompts.
        superclass: the everyday word the concept is a kind of.
        embeddings: text encoder ("l", "g", ...) -> its token vector (dim,).
        i: the target input.
        u: the dual of i.
        superclass_encoding: what locked keys are made of.
        o_v: a cross-attention's module path -> its value output (d,).
        o_k: the same for trained keys, None for keys locked to the superclass.
        twin_locked: whether it was trained with the twin lock (`gated.twin_lock`).
        gate: the gate at inference.
        train_gate: the gate it was trained with.
        metadata: everything else as text (hashes, training settings, modelspec keys, thumbnail).
        schedule: when and where it acts; takes the place of the gate's bias and temperature, and
            belongs to a workflow, not to the file.

    Raises:
        ValueError: naming the field, when the pieces do not fit together.
    """

    family: str
    placeholder: str
    superclass: str
    embeddings: Mapping[str, Tensor]
    i: Vector
    u: Vector
    superclass_encoding: Vector
    o_v: Mapping[str, Tensor]
    o_k: Mapping[str, Tensor] | None = None
    gate: Gate = INFERENCE_GATE
    train_gate: Gate = TRAINING_GATE
    metadata: Mapping[str, str] = field(default_factory=dict)
    schedule: GateSchedule | None = None
    twin_locked: bool = False

    def __post_init__(self) -> None:
        check_identifier("family", self.family)
        check_word("placeholder", self.placeholder)
        check_phrase("superclass", self.superclass)
        self._check_vectors()
        self._check_layers()
        _check_thumbnail(self.metadata)

    @property
    def key_lock(self) -> TrainedLock:
        """How it was trained: keys locked at its own word, by its twin, or learned."""
        if self.o_k is not None:
            return "trained"
        return "twin" if self.twin_locked else "local"

    @property
    def layers(self) -> dict[str, int]:
        """Module path of every edited cross-attention -> d."""
        return {name: output.shape[0] for name, output in self.o_v.items()}

    @cached_property
    def energy(self) -> float:
        """``i . u``, in fp64; as a file says it where the concept comes from one."""
        return float(self.i.to("cpu", torch.float64) @ self.u.to("cpu", torch.float64))

    def with_gate(
        self,
        bias: float | None = None,
        temperature: float | None = None,
        strength: float | None = None,
    ) -> Concept:
        """The same concept with another inference gate; None keeps a value.

        Raises:
            ValueError: for values the gate cannot take, and for another bias or temperature of a
                scheduled concept.
        """
        if self.schedule is not None and not bias is temperature is None:
            raise ValueError(
                f"the schedule of concept '{self.placeholder}' decides its bias and temperature; "
                "set the gate first and the schedule after it"
            )
        asked = {"bias": bias, "temperature": temperature, "strength": strength}
        given = {name: value for name, value in asked.items() if value is not None}
        return self._with(gate=replace(self.gate, **given))

    def with_schedule(self, schedule: GateSchedule | None) -> Concept:
        """The same concept acting only when and where a schedule says (None: always)."""
        return self._with(schedule=schedule)

    def with_metadata(self, entries: Mapping[str, str]) -> Concept:
        """The same concept saying more about itself; entries of the same key are replaced.

        Raises:
            ValueError: for a thumbnail that is none.
        """
        metadata = {**self.metadata, **entries}
        _check_thumbnail(metadata)
        return self._with(metadata=metadata)

    def with_energy(self, energy: float) -> Concept:
        """The same concept with ``i . u`` as it was before u was rounded to fp32."""
        return self._with(energy=energy)

    def direction(self) -> Direction:
        """The gate and direction `rank_one` works with, named after the placeholder."""
        return Direction(self.i, self.u, self.gate, name=self.placeholder)

    def twin_direction(self, parts: Sequence[int] = ()) -> Direction:
        """The same for twin lock, which compares what the placeholder changes.

        Args:
            parts: widths of the encodings, where several text encoders have spaces of their own.
        """
        i, superclass = (
            each.to("cpu", torch.float64) for each in (self.i, self.superclass_encoding)
        )
        return twin_direction(i, superclass, self.gate, self.placeholder, parts)

    def _with(self, **fields: object) -> Concept:
        """A copy with fields that were checked when they were made: the others still fit."""
        changed = copy.copy(self)
        changed.__dict__.update(fields)
        return changed

    def _check_vectors(self) -> None:
        if not self.embeddings:
            raise ValueError("embeddings: expected a vector for each text encoder, found none")
        for encoder in self.embeddings:
            check_identifier("embeddings", encoder)
        _check_all({f"embedding.{name}": vector for name, vector in self.embeddings.items()})
        width = self.i.shape[0] if self.i.ndim == 1 else None
        encodings = {"i": self.i, "u": self.u, "superclass_encoding": self.superclass_encoding}
        _check_all(encodings, dict.fromkeys(encodings, width))
        if not 0 < self.energy < math.inf:
            raise ValueError(f"u: expected a positive energy i.u, found {self.energy}")

    def _check_layers(self) -> None:
        if not 0 < len(self.o_v) <= LAYER_LIMIT:
            raise ValueError(f"o_v: expected 1 to {LAYER_LIMIT} layers, found {len(self.o_v)}")
        for name in self.o_v:
            check_identifier("layer", name)
        _check_all({f"o_v of {name}": output for name, output in self.o_v.items()})
        if self.o_k is None:
            return
        if self.twin_locked:
            raise ValueError(
                "o_k: expected no keys of its own in a concept with twin lock, whose keys are its "
                f"superclass's, found {len(self.o_k)} layers of them"
            )
        if list(self.o_k) != list(self.o_v):
            raise ValueError(
                f"o_k: expected the {len(self.o_v)} layers of o_v in their order, "
                f"found {len(self.o_k)} others"
            )
        widths = {f"o_k of {name}": output.shape[0] for name, output in self.o_v.items()}
        _check_all({f"o_k of {name}": output for name, output in self.o_k.items()}, widths)


def _check_thumbnail(metadata: Mapping[str, str]) -> None:
    thumbnail = metadata.get("modelspec.thumbnail", "data:image/")
    if not thumbnail.startswith("data:image/") or len(thumbnail) > THUMBNAIL_LIMIT:
        raise ValueError(
            f"modelspec.thumbnail: expected a data:image/ URL of at most {THUMBNAIL_LIMIT} "
            f"characters, found {len(thumbnail)} starting with {thumbnail[:20]!r}"
        )


def _check_all(
    vectors: Mapping[str, Tensor], widths: Mapping[str, int | None] | None = None
) -> None:
    """Check vectors by name: their form one by one, and that they are finite at one go."""
    for key, vector in vectors.items():
        if vector.ndim != 1 or vector.shape[0] == 0 or not vector.is_floating_point():
            raise ValueError(
                f"{key}: expected a floating-point vector, found {tuple(vector.shape)} "
                f"{vector.dtype}"
            )
        width = None if widths is None else widths[key]
        if width is not None and vector.shape[0] != width:
            raise ValueError(f"{key}: expected {width} values, found {vector.shape[0]}")
    if bool(torch.isfinite(torch.cat(list(vectors.values()))).all()):
        return
    for key, vector in vectors.items():
        if not bool(torch.isfinite(vector).all()):
            raise ValueError(f"{key}: expected finite values, found NaN or infinity")
