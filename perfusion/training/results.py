"""What a training run tells its caller while it goes, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from ..concept.concept import Concept
from .loss_bands import BandMeans, LossRecord
from .state import TrainingState


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: the step that was made, counted from 1.
        loss: its mean loss.
        smoothed: the running means of the timesteps' bands after it.
    """

    step: int
    loss: float
    smoothed: BandMeans


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """What a run learned.

    Attributes:
        concept: after as many good steps as there were.
        record: the losses of each.
        state: what goes on from there.
        error: None, or why training stopped early (NaN) with the concept as it was before.
    """

    concept: Concept
    record: LossRecord
    state: TrainingState
    error: str | None = None

    @property
    def steps(self) -> int:
        """How many good steps were done."""
        return self.state.step

    @cached_property
    def losses(self) -> tuple[float, ...]:
        """The loss of each step."""
        return self.record.per_step()


def _nothing(*_: object) -> None:
    pass


def _no(*_: object) -> bool:
    return False


@dataclass(frozen=True)
class TrainingCallbacks:
    """What a caller wants to hear and to say during training; anything may raise.

    Attributes:
        on_step: follows each step.
        on_sample: called with the step and the concept before the first step, every
            ``sample_every`` steps and after the last.
        on_checkpoint: called every ``checkpoint_every`` steps and after the last.
        on_partial: receives the last good state when an exception, BaseException included, is
            about to leave the run.
        should_stop: asked before each step; True ends the run with what it has.
        is_out_of_memory: tells such an exception from others.
        on_fewer_rows: called with n before a step is tried again with at most n rows at once.
    """

    on_step: Callable[[Progress], None] = _nothing
    on_sample: Callable[[int, Concept], None] = _nothing
    on_checkpoint: Callable[[TrainingResult], None] = _nothing
    on_partial: Callable[[TrainingResult], None] = _nothing
    should_stop: Callable[[], bool] = _no
    is_out_of_memory: Callable[[Exception], bool] = _no
    on_fewer_rows: Callable[[int], None] = _nothing
