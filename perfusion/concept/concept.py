"""A personalised concept (its file: `concept_file`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..gated.gate import INFERENCE_GATE, TRAINING_GATE, Gate
from ..gated.gate_schedule import GateSchedule
from ..gated.rank_one import Direction
from ..text.words import check_identifier, check_phrase, check_word

LAYER_LIMIT = 4096
THUMBNAIL_LIMIT = 2**20


@dataclass(frozen=True, eq=False)
class Concept:
    """What training a concept leaves behind.

    ``family`` names the model family ("sd1", "sdxl", ...). ``placeholder`` is the word used in
    prompts. ``embeddings`` maps a text encoder ("l", "g", ...) to its token vector (dim,). ``i``,
    ``u`` and ``superclass_encoding`` have shape (D,). ``o_v`` maps a cross-attention's module path
    to its value output (d,); ``o_k`` holds trained keys and is None for keys locked to the
    superclass. ``gate`` is the gate at inference, ``train_gate`` the one it was trained with.
    ``metadata`` carries everything else as text (hashes, training settings, modelspec keys,
    thumbnail). ``schedule`` says when and where it acts and takes the place of the gate's bias and
    temperature; it belongs to a workflow, not to the file.

    Raises ValueError, naming the field, when the pieces do not fit together.
    """

    family: str
    placeholder: str
    superclass: str
    embeddings: Mapping[str, Tensor]
    i: Tensor
    u: Tensor
    superclass_encoding: Tensor
    o_v: Mapping[str, Tensor]
    o_k: Mapping[str, Tensor] | None = None
    gate: Gate = INFERENCE_GATE
    train_gate: Gate = TRAINING_GATE
    metadata: Mapping[str, str] = field(default_factory=dict)
    schedule: GateSchedule | None = None

    def __post_init__(self) -> None:
        check_identifier("family", self.family)
        check_word("placeholder", self.placeholder)
        check_phrase("superclass", self.superclass)
        self._check_vectors()
        self._check_layers()
        thumbnail = self.metadata.get("modelspec.thumbnail", "data:image/")
        if not thumbnail.startswith("data:image/") or len(thumbnail) > THUMBNAIL_LIMIT:
            raise ValueError(
                f"modelspec.thumbnail: expected a data:image/ URL of at most {THUMBNAIL_LIMIT} "
                f"characters, found {len(thumbnail)} starting with {thumbnail[:20]!r}"
            )

    @property
    def key_lock(self) -> str:
        """ "local" for keys locked to the superclass, "trained" for learned ones."""
        return "local" if self.o_k is None else "trained"

    @property
    def layers(self) -> dict[str, int]:
        """Module path of every edited cross-attention -> d."""
        return {name: output.shape[0] for name, output in self.o_v.items()}

    @property
    def energy(self) -> float:
        """``i . u``."""
        return float(self.direction().energy)

    def with_gate(
        self,
        bias: float | None = None,
        temperature: float | None = None,
        strength: float | None = None,
    ) -> Concept:
        """The same concept with another inference gate; None keeps a value.

        Raises ValueError for another bias or temperature of a scheduled concept.
        """
        if self.schedule is not None and not bias is temperature is None:
            raise ValueError(
                f"the schedule of concept '{self.placeholder}' decides its bias and temperature; "
                "set the gate first and the schedule after it"
            )
        asked = {"bias": bias, "temperature": temperature, "strength": strength}
        given = {name: value for name, value in asked.items() if value is not None}
        return replace(self, gate=replace(self.gate, **given))

    def with_schedule(self, schedule: GateSchedule | None) -> Concept:
        """The same concept acting only when and where a schedule says (None: always)."""
        return replace(self, schedule=schedule)

    def direction(self) -> Direction:
        """The gate and direction `rank_one` works with, named after the placeholder."""
        return Direction(self.i, self.u, self.gate, name=self.placeholder)

    def _check_vectors(self) -> None:
        if not self.embeddings:
            raise ValueError("embeddings: expected a vector for each text encoder, found none")
        for encoder, vector in self.embeddings.items():
            check_identifier("embeddings", encoder)
            _check_vector(f"embedding.{encoder}", vector)
        _check_vector("i", self.i)
        _check_vector("u", self.u, self.i.shape[0])
        _check_vector("superclass_encoding", self.superclass_encoding, self.i.shape[0])
        energy = self.energy
        if not 0 < energy < math.inf:
            raise ValueError(f"u: expected a positive energy i.u, found {energy}")

    def _check_layers(self) -> None:
        if not 0 < len(self.o_v) <= LAYER_LIMIT:
            raise ValueError(f"o_v: expected 1 to {LAYER_LIMIT} layers, found {len(self.o_v)}")
        for name, output in self.o_v.items():
            check_identifier("layer", name)
            _check_vector(f"o_v of {name}", output)
        if self.o_k is None:
            return
        if list(self.o_k) != list(self.o_v):
            raise ValueError(
                f"o_k: expected the {len(self.o_v)} layers of o_v in their order, "
                f"found {len(self.o_k)} others"
            )
        for name, output in self.o_k.items():
            _check_vector(f"o_k of {name}", output, self.o_v[name].shape[0])


def _check_vector(key: str, vector: Tensor, width: int | None = None) -> None:
    if vector.ndim != 1 or vector.shape[0] == 0 or not vector.is_floating_point():
        raise ValueError(
            f"{key}: expected a floating-point vector, found {tuple(vector.shape)} {vector.dtype}"
        )
    if width is not None and vector.shape[0] != width:
        raise ValueError(f"{key}: expected {width} values, found {vector.shape[0]}")
    if not bool(torch.isfinite(vector).all()):
        raise ValueError(f"{key}: expected finite values, found NaN or infinity")
