"""Inputs of the training options, by what they are about."""

from __future__ import annotations

from typing import get_args

from comfy_api.latest import io

from ..host.training.options import SAMPLE_PROMPTS, Resume, TrainingOptions
from ..host.training.private_copy import Precision
from ..perfusion.training.config import RateSchedule, RateUnit
from ..perfusion.training.losses import Normalisation

DEFAULT = TrainingOptions()


def samples_inputs() -> list[io.Input]:
    """Pictures while it learns."""
    return [
        io.Int.Input(
            "sample_every",
            optional=True,
            default=DEFAULT.sample_every,
            min=0,
            max=10000,
            tooltip="Steps between two samples: pictures that show what has been learned so far, "
            "on the node while it runs and in its samples output. 0: none.",
        ),
        io.String.Input(
            "sample_prompts",
            optional=True,
            default="\n".join(SAMPLE_PROMPTS),
            multiline=True,
            tooltip="What to draw, one prompt a line, with {} or the placeholder where the thing "
            "is named. Empty: two built-in ones.",
        ),
        io.Int.Input(
            "sample_steps",
            optional=True,
            default=DEFAULT.sample_steps,
            min=1,
            max=200,
            tooltip="Sampling steps for each sample.",
            advanced=True,
        ),
        io.Float.Input(
            "sample_cfg",
            optional=True,
            default=DEFAULT.sample_cfg,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="How closely samples follow their prompts, as a KSampler's cfg.",
            advanced=True,
        ),
        io.Int.Input(
            "sample_seed",
            optional=True,
            default=DEFAULT.sample_seed,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            tooltip="The seed of every sample, so that only the concept differs between them.",
            advanced=True,
        ),
    ]


def checkpoints_inputs() -> list[io.Input]:
    """What is kept on the way, and going on from it."""
    return [
        io.Int.Input(
            "checkpoint_every",
            optional=True,
            default=DEFAULT.checkpoint_every,
            min=0,
            max=10000,
            tooltip="Steps between two checkpoints in models/perfusion/runs: a concept to use and "
            "all it takes to go on. Cancelling keeps them in any case. 0: only then and at the "
            "end.",
        ),
        io.Combo.Input(
            "resume",
            optional=True,
            options=list(get_args(Resume)),
            default=DEFAULT.resume,
            tooltip="unfinished: goes on with the same training if it was cancelled or the server "
            "died. always: also makes a finished one longer, with a constant schedule. never: "
            "starts anew. The same is the same model, pictures, words, seed and settings.",
        ),
    ]


def memory_inputs() -> list[io.Input]:
    """Precision, and memory for time."""
    return [
        io.Combo.Input(
            "precision",
            optional=True,
            options=list(get_args(Precision)),
            default=DEFAULT.precision,
            tooltip="What the model computes in. auto: what it is stored in, but bf16 (or fp32) "
            "instead of fp16. bf16 and fp16 take half the memory of fp32.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            optional=True,
            default=DEFAULT.gradient_checkpointing,
            tooltip="Needs much less memory and about a third more time; learns the same.",
        ),
        io.Int.Input(
            "rows_at_once",
            optional=True,
            default=DEFAULT.rows_at_once,
            min=0,
            max=64,
            tooltip="Pictures of a batch computed together; fewer need less memory and learn the "
            "same. 0: all, and fewer by itself when memory does not suffice.",
            advanced=True,
        ),
    ]


def images_inputs() -> list[io.Input]:
    """How pictures are brought to size and varied."""
    images = DEFAULT.images
    return [
        io.Int.Input(
            "resolution",
            optional=True,
            default=images.resolution,
            min=0,
            max=4096,
            step=64,
            tooltip="Brings every picture to about this size squared, each in its own shape and "
            "without squashing: 512 for SD1.x, 1024 for SDXL. 0: larger ones to the model's own "
            "size, smaller ones stay as they are.",
        ),
        io.Boolean.Input(
            "flip",
            optional=True,
            default=images.flip,
            tooltip="Also learns from the mirrored pictures. Not for things with writing, or that "
            "look different on either side.",
        ),
        io.Boolean.Input(
            "use_alpha",
            optional=True,
            default=images.alpha,
            tooltip="Takes the transparency of pictures as their mask where no mask is connected. "
            "Load Photos keeps it; Load Image gives it as a MASK, which goes through Invert Mask.",
            advanced=True,
        ),
        io.Float.Input(
            "crop",
            optional=True,
            default=images.crop,
            min=0.0,
            max=0.9,
            step=0.05,
            tooltip="Also learns from closer views: the largest share of each side that is cut "
            "off. Needs variants of 2 or more.",
            advanced=True,
        ),
        io.Float.Input(
            "zoom_out",
            optional=True,
            default=images.zoom_out,
            min=0.0,
            max=0.9,
            step=0.05,
            tooltip="Also learns from views further away: the largest share of each side that is "
            "added around, which itself is not learned. Needs variants of 2 or more.",
            advanced=True,
        ),
        io.Int.Input(
            "variants",
            optional=True,
            default=images.variants,
            min=1,
            max=64,
            tooltip="How many versions of each picture crop and zoom_out make. They are encoded "
            "once, before training.",
            advanced=True,
        ),
    ]


def masks_inputs() -> list[io.Input]:
    """What masks count."""
    return [
        io.Float.Input(
            "mask_background",
            optional=True,
            default=DEFAULT.background,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="How much what is outside the mask still counts: 0 not at all, 1 as much as "
            "the thing.",
            advanced=True,
        ),
        io.Combo.Input(
            "mask_normalisation",
            optional=True,
            options=list(get_args(Normalisation)),
            default=DEFAULT.normalisation,
            tooltip="subject: every picture counts the same however small the thing is in it. "
            "picture: the larger the thing, the more its picture counts.",
            advanced=True,
        ),
    ]


def learning_inputs() -> list[io.Input]:
    """The method's own settings."""
    return [
        io.Combo.Input(
            "schedule",
            optional=True,
            options=list(get_args(RateSchedule)),
            default=DEFAULT.schedule,
            tooltip="Learning rates over the steps. cosine: down to 0 at the end, so that a "
            "concept does not carry the last steps' noise; such a training cannot be made longer. "
            "constant: as in the paper.",
            advanced=True,
        ),
        io.String.Input(
            "templates",
            optional=True,
            default="",
            multiline=True,
            tooltip="The sentences to train with, one a line, each with one {} where the thing is "
            "named. Empty: the built-in ones. Captions take their place.",
            advanced=True,
        ),
        io.Float.Input(
            "train_bias",
            optional=True,
            default=DEFAULT.bias,
            min=-2.0,
            max=2.0,
            step=0.01,
            tooltip="The gate's bias while training (paper: 0.75).",
            advanced=True,
        ),
        io.Float.Input(
            "train_temperature",
            optional=True,
            default=DEFAULT.temperature,
            min=0.01,
            max=5.0,
            step=0.01,
            tooltip="The gate's temperature while training (paper: 0.1).",
            advanced=True,
        ),
        io.Float.Input(
            "ema",
            optional=True,
            default=DEFAULT.ema,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="How slowly the concept's target input follows its encoding (paper: 0.99).",
            advanced=True,
        ),
        io.Combo.Input(
            "rate_unit",
            optional=True,
            options=list(get_args(RateUnit)),
            default=DEFAULT.rate_unit,
            tooltip="What the learning rates count in. relative: the size of what is learned, so "
            "that one rate suits every model and layer. absolute: plain numbers, as in the paper "
            "(0.03, and 0.006 for the new word).",
            advanced=True,
        ),
    ]
