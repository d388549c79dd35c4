"""One training run inside a prompt: shown while it goes, kept on disk, continued where it was."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...perfusion.concept.concept import Concept
from ...perfusion.gated.covariance import Covariance
from ...perfusion.training.config import TrainingConfig
from ...perfusion.training.results import Progress, TrainingCallbacks, TrainingResult
from ...perfusion.training.run import train_concept, training_fingerprint
from ..interface.messages import tell
from .live import LiveProgress
from .options import TrainingOptions
from .run_folders import thin_run
from .runs import Run
from .samples import Painter, SampleSettings, Strip, of_png, side_by_side, to_png
from .selection import Checkpoint
from .view import TrainingView

logger = logging.getLogger("perfusion")

_PREVIEW_SIDE = 1024


class Session:
    """Drives `train_concept` for a node: progress, previews, interrupts, files.

    `sign` adds to a concept what is recorded of its origin.
    """

    def __init__(
        self,
        view: TrainingView,
        painter: Painter,
        config: TrainingConfig,
        options: TrainingOptions,
        covariance: Covariance,
        sign: Callable[[Concept], Concept],
    ) -> None:
        self.view = view
        self.painter = painter
        self.config = config
        self.options = options
        self.covariance = covariance
        self.sign = sign
        prompts = options.prompts_for(config.placeholder)
        self.settings = SampleSettings(
            *(prompts, options.sample_steps, options.sample_cfg, options.sample_seed, view.shape(0))
        )
        self.strip = Strip()
        self.run = Run(config.placeholder, training_fingerprint(view, config, covariance))
        self.began_at = 0
        self.saved = "nothing was learned yet"
        self._progress = comfy.utils.ProgressBar(config.steps)
        self._live = LiveProgress(config.steps, view.patcher.load_device)
        self._concepts: dict[int, Concept] = {}
        self._paints = bool(prompts)

    def train(self) -> TrainingResult:
        """Every step that is left, from where an earlier run stopped or from the start."""
        state = self.run.start(self.options.resume, self.config.steps)
        if state is not None:
            self.began_at = state.step
            tell(
                f"continuing from step {state.step} of {self.config.steps}, found in "
                f"{self.run.folder}"
            )
            self._find_samples(state.step)
        callbacks = TrainingCallbacks(
            on_step=self._on_step,
            on_sample=self._on_sample,
            on_checkpoint=self._on_checkpoint,
            on_partial=self.keep_partial,
            is_out_of_memory=comfy.model_management.is_oom,
            on_fewer_rows=self._on_fewer_rows,
        )
        result = train_concept(self.view, self.config, self.covariance, callbacks, state)
        if result.error is None:
            if self._paints and result.steps not in self.strip.pictures:
                self._on_sample(result.steps, result.concept)
            if self.run.saved_step != result.steps:
                self.run.save(self.sign(result.concept), result)
        return result

    def finish(self) -> None:
        """Say that nothing is left to do, so that the same training would start anew."""
        self.run.finish(self.config.steps)
        thin_run(self.run.folder)

    def keep_partial(self, result: TrainingResult) -> None:
        """Keep the last good state of a run that is cut off, and say where."""
        if not result.steps:
            return
        learned = f"what {result.steps} steps learned"
        if self.run.save(self.sign(result.concept), result):
            self.saved = f"{learned} is in {self.run.file(result.steps)}"
            tell(f"training did not finish; {self.saved}")
        else:
            self.saved = f"{learned} is lost: {self.run.problem}"
            logger.error("training did not finish; %s", self.saved)

    def checkpoints(self) -> list[Checkpoint]:
        """Concepts along the way with what they draw, for choosing the best."""
        found = []
        for step, pictures in sorted(self.strip.pictures.items()):
            concept = self._concepts.get(step) or (self.run.concept(step) if step else None)
            if concept is not None:
                found.append(Checkpoint(step, concept, pictures.float() / 255))
        return found

    def plain_pictures(self) -> Tensor:
        """What the superclass draws for the same prompts and seeds, (n, H, W, 3) in 0..1."""
        word, superclass = self.config.placeholder, self.config.superclass
        prompts = tuple(prompt.replace(word, superclass) for prompt in self.settings.prompts)
        return self._draw(prompts, None).float() / 255

    def picture(self) -> Tensor:
        """The strip, or a plain grey picture when there are no samples, (1, H, W, 3) in 0..1."""
        picture = self.strip.picture()
        return torch.full((1, 64, 64, 3), 0.5) if picture is None else picture

    def _on_step(self, done: Progress) -> None:
        logger.debug("step %d of %d, loss %.5f", done.step, self.config.steps, done.smoothed.mean)
        self._progress.update_absolute(done.step, self.config.steps)
        self._live.on_step(done)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def _on_checkpoint(self, result: TrainingResult) -> None:
        if not self.run.save(self.sign(result.concept), result):
            logger.warning("training goes on without a checkpoint of step %d", result.steps)

    def _on_sample(self, step: int, concept: Concept) -> None:
        if not self._paints:
            return
        concept = self.sign(concept)
        pictures = None
        try:
            pictures = self._draw(self.settings.prompts, concept)
        except Exception as error:
            if not comfy.model_management.is_oom(error):
                raise
        # Not in the handler, which would keep the failed picture's tensors alive.
        if pictures is None:
            logger.warning("not enough memory to draw samples; training goes on without them")
            self._paints = False
            comfy.model_management.soft_empty_cache()
            return
        if step:
            self._concepts[step] = concept
            self.run.keep(concept, step)
        self.run.keep_file(_sample_name(step), to_png(pictures, self.settings))
        self._show(step, pictures)

    def _on_fewer_rows(self, rows: int) -> None:
        comfy.model_management.soft_empty_cache()
        tell(f"not enough memory: going on with at most {rows} pictures at once, in the same steps")

    def _find_samples(self, last: int) -> None:
        """What an earlier run drew, and what it would have drawn of the concepts it kept."""
        if not self._paints:
            return
        for step in range(0, last + 1, self.options.sample_every):
            content = self.run.other_file(_sample_name(step))
            pictures = None if content is None else of_png(content, self.settings)
            if pictures is not None:
                self._show(step, pictures)
            elif step and (concept := self.run.concept(step)) is not None:
                self._on_sample(step, concept)

    def _show(self, step: int, pictures: Tensor) -> None:
        self.strip.pictures[step] = pictures
        preview = ("JPEG", side_by_side(pictures), _PREVIEW_SIDE)
        self._progress.update_absolute(max(step, self.began_at), self.config.steps, preview)

    def _draw(self, prompts: tuple[str, ...], concept: Concept | None) -> Tensor:
        settings = replace(self.settings, prompts=prompts)
        view, stays = self.view, not self.view.text.released
        return self.painter.draw(view.patcher, view.clip, settings, concept, stays)


def _sample_name(step: int) -> str:
    return f"sample_{step:05}.png"
