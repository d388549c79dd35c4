"""A training run between two steps: everything it takes to go on bit for bit, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..files.safe_file import read_untrusted, refuse, write_atomically

FORMAT_VERSION = "1"
_DTYPES = ("F32", "F64", "I64", "U8")


@dataclass(frozen=True, eq=False)
class TrainingState:
    """What a run is after ``step`` good steps.

    Attributes:
        fingerprint: that of the settings, the data and the model it belongs to.
        step: how many good steps there were.
        tensors: on the CPU, the learned ones, the optimiser's moments, the followed input i, the
            random generator, and the losses so far, under names `run` and `learner` agree on.
        scale: the factor that keeps fp16 gradients from vanishing (1 elsewhere).
        since_scaled: how many steps it has held.
    """

    fingerprint: str
    step: int
    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    since_scaled: int = 0


def save_state(state: TrainingState, path: Path) -> None:
    """Write a state as .safetensors, atomically.

    Raises:
        OSError: when the disk refuses.
    """
    metadata = {
        "perfusion_training": FORMAT_VERSION,
        "fingerprint": state.fingerprint,
        "step": str(state.step),
        "scale": repr(state.scale),
        "since_scaled": str(state.since_scaled),
    }
    write_atomically(path, {k: v.contiguous() for k, v in state.tensors.items()}, metadata)


def load_state(path: Path) -> TrainingState:
    """Read a state, trusting nothing in it.

    Raises:
        FileFormatError: saying what is wrong with a file.
    """
    tensors, metadata = read_untrusted(path, _DTYPES)
    version = metadata.get("perfusion_training")
    if version != FORMAT_VERSION:
        refuse(path, "perfusion_training", f"a training state of version {FORMAT_VERSION}", version)
    for name, least in (("step", 0), ("since_scaled", 0), ("scale", 0)):
        value = metadata.get(name, "")
        try:
            good = 0 <= least <= float(value) < float("inf")
        except ValueError:
            good = False
        if not good or (name != "scale" and not value.isdecimal()):
            refuse(path, name, "a number of at least 0", value)
    return TrainingState(
        fingerprint=metadata.get("fingerprint", ""),
        step=int(metadata["step"]),
        tensors=tensors,
        scale=float(metadata["scale"]),
        since_scaled=int(metadata["since_scaled"]),
    )


def check_same_run(state: TrainingState, fingerprint: str, rows: int, random: Tensor) -> None:
    """Make sure that a run of ``rows`` a step can go on from a state.

    ``random`` is the state of a random generator, for its shape.

    Raises:
        ValueError: for another run's state, and for one without what was drawn so far.
    """
    if state.fingerprint != fingerprint:
        raise ValueError(
            "expected a training state of the same model, pictures, words and settings, found "
            "another run's; train from the start, or set everything as it was"
        )
    of_rows = (state.step, rows)
    shapes = {"losses": of_rows, "timesteps": of_rows, "random": tuple(random.shape)}
    for name, shape in shapes.items():
        found = state.tensors.get(name)
        if found is None or tuple(found.shape) != shape:
            what = "nothing" if found is None else str(tuple(found.shape))
            raise ValueError(
                f"the training state's {name}: expected {shape}, found {what}; it is damaged: "
                "train from the start"
            )
