"""A personalised concept: the value and its file (whose format `concept_file` describes)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..files.safe_file import ConceptFileError, read_untrusted, write_atomically
from ..gated.gate_schedule import Schedule
from ..gated.rank_one import Direction
from ..text.words import check_identifier, check_phrase, check_word
from .concept_file import LAYER_LIMIT, decode, encode

__all__ = ["Concept", "ConceptFileError", "load_concept", "save_concept"]

THUMBNAIL_LIMIT = 2**20


@dataclass(frozen=True, eq=False)
class Concept:
    """What training a concept leaves behind.

    ``family`` names the model family ("sd1", "sdxl", ...). ``placeholder`` is the word used in
    prompts. ``embeddings`` maps a text encoder ("l", "g", ...) to its token vector (dim,). ``i``,
    ``u`` and ``superclass_encoding`` have shape (D,). ``o_v`` maps a cross-attention's module path
    to its value output (d,); ``o_k`` holds trained keys and is None for keys locked to the
    superclass. ``bias``, ``temperature`` and ``strength`` are the gate at inference,
    ``train_bias`` and ``train_temperature`` the gate it was trained with. ``metadata`` carries
    everything else as text (hashes, training settings, modelspec keys, thumbnail). ``schedule``
    says when and where it acts and takes the place of ``bias`` and ``temperature``; it belongs to
    a workflow, not to the file.

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
    bias: float = 0.65
    temperature: float = 0.15
    strength: float = 1.0
    train_bias: float = 0.75
    train_temperature: float = 0.1
    metadata: Mapping[str, str] = field(default_factory=dict)
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        check_identifier("family", self.family)
        check_word("placeholder", self.placeholder)
        check_phrase("superclass", self.superclass)
        self._check_gates()
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
        return replace(
            self,
            bias=self.bias if bias is None else bias,
            temperature=self.temperature if temperature is None else temperature,
            strength=self.strength if strength is None else strength,
        )

    def with_schedule(self, schedule: Schedule | None) -> Concept:
        """The same concept acting only when and where a schedule says (None: always)."""
        return replace(self, schedule=schedule)

    def direction(self) -> Direction:
        """The gate and direction `rank_one` works with, named after the placeholder."""
        return Direction(
            i=self.i,
            u=self.u,
            bias=self.bias,
            temperature=self.temperature,
            strength=self.strength,
            name=self.placeholder,
        )

    def _check_gates(self) -> None:
        for name in ("bias", "strength", "train_bias"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, found {value}")
        for name in ("temperature", "train_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0, found {value}")

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


def save_concept(concept: Concept, path: Path | str, dtype: torch.dtype = torch.float16) -> Path:
    """Write a concept as .safetensors in fp16 (or fp32), atomically; returns the path written.

    A missing folder is made. Raises ValueError for another suffix or dtype, for a concept with a
    schedule, for metadata that takes one of the format's own keys, and for values fp16 cannot
    hold; OSError when the disk refuses, leaving no partial file and any former one untouched.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"expected a path ending in .safetensors, found {path.name!r}")
    if concept.schedule is not None:
        raise ValueError(
            f"concept '{concept.placeholder}' has a schedule, which a file does not keep; save the "
            "concept as it was before the schedule"
        )
    tensors, metadata = encode(concept, dtype)
    write_atomically(path, tensors, metadata)
    return path


def load_concept(path: Path | str) -> Concept:
    """Read a concept file, trusting nothing in it; tensors come as fp32 on the CPU.

    Every fault raises `ConceptFileError`, naming the file, the key, what was expected and found.
    """
    path = Path(path)
    fields = decode(path, *read_untrusted(path))
    try:
        return Concept(**fields)
    except ValueError as error:
        raise ConceptFileError(f"{path}: {error}") from error
