"""The node with everything about training that few people need to change."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.pictures.training_images import ImageOptions
from ..host.training.options import SAMPLE_PROMPTS, Resume, TrainingOptions
from ..host.training.private_copy import Precision
from ..perfusion.text.lines import lines_of
from ..perfusion.text.prompts import TEMPLATES
from ..perfusion.training.config import RateSchedule, RateUnit
from ..perfusion.training.losses import Normalisation
from .kinds import TrainingOptionsKind
from .training_inputs import (
    DEFAULT,
    checkpoints_inputs,
    images_inputs,
    learning_inputs,
    masks_inputs,
    memory_inputs,
    samples_inputs,
)

CATEGORY = "perfusion/training"


class PerfusionTrainingOptions(io.ComfyNode):
    """Settings of a training beside the main ones; all may be left out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionTrainingOptions",
            display_name="Training Options (Perfusion)",
            category=CATEGORY,
            description="More settings for Train Concept: samples while it learns, checkpoints and "
            "resuming, precision and memory, masks, and how pictures are brought to size.",
            search_aliases=["perfusion", "resume", "gradient checkpointing", "samples"],
            inputs=[
                *samples_inputs(),
                *checkpoints_inputs(),
                *memory_inputs(),
                *images_inputs(),
                *masks_inputs(),
                *learning_inputs(),
            ],
            outputs=[
                TrainingOptionsKind.Output(
                    display_name="options", tooltip="The settings, for Train Concept."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        sample_every: int = DEFAULT.sample_every,
        sample_prompts: str = "",
        sample_steps: int = DEFAULT.sample_steps,
        sample_cfg: float = DEFAULT.sample_cfg,
        sample_seed: int = DEFAULT.sample_seed,
        checkpoint_every: int = DEFAULT.checkpoint_every,
        resume: Resume = DEFAULT.resume,
        precision: Precision = DEFAULT.precision,
        gradient_checkpointing: bool = DEFAULT.gradient_checkpointing,
        rows_at_once: int = DEFAULT.rows_at_once,
        resolution: int = DEFAULT.images.resolution,
        flip: bool = DEFAULT.images.flip,
        use_alpha: bool = DEFAULT.images.alpha,
        crop: float = DEFAULT.images.crop,
        zoom_out: float = DEFAULT.images.zoom_out,
        variants: int = DEFAULT.images.variants,
        mask_background: float = DEFAULT.background,
        mask_normalisation: Normalisation = DEFAULT.normalisation,
        schedule: RateSchedule = DEFAULT.schedule,
        templates: str = "",
        train_bias: float = DEFAULT.bias,
        train_temperature: float = DEFAULT.temperature,
        ema: float = DEFAULT.ema,
        rate_unit: RateUnit = DEFAULT.rate_unit,
    ) -> io.NodeOutput:
        """PERFUSION_TRAINING_OPTIONS."""
        options = TrainingOptions(
            precision=precision,
            gradient_checkpointing=gradient_checkpointing,
            rows_at_once=rows_at_once,
            sample_every=sample_every,
            sample_prompts=lines_of(sample_prompts) or SAMPLE_PROMPTS,
            sample_steps=sample_steps,
            sample_cfg=sample_cfg,
            sample_seed=sample_seed,
            checkpoint_every=checkpoint_every,
            resume=resume,
            background=mask_background,
            normalisation=mask_normalisation,
            images=ImageOptions(
                resolution=resolution,
                flip=flip,
                crop=crop,
                zoom_out=zoom_out,
                variants=variants,
                alpha=use_alpha,
            ),
            schedule=schedule,
            bias=train_bias,
            temperature=train_temperature,
            ema=ema,
            rate_unit=rate_unit,
            templates=lines_of(templates) or TEMPLATES,
        )
        return io.NodeOutput(options)
