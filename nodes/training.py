"""Training in a graph: the statistics of a text encoder, and a concept from a few pictures."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..host.models.loaded import Models
from ..host.text.caption_sources import known_to, of_file, of_text
from ..host.text.captions import COUNT
from ..host.text.covariance import describe
from ..host.training.options import TrainingOptions, captions_of
from ..host.training.train import Material, covariance_with_progress, train
from ..perfusion.gated.covariance import Covariance, Positions
from ..perfusion.text.prompts import captions_for
from ..perfusion.training.config import Mode, TrainingConfig
from .common_inputs import clip_input, superclass_input, vae_input
from .kinds import ConceptKind, CovarianceKind, LossMapKind, TrainingOptionsKind
from .lists import first_or_none, only

CATEGORY = "perfusion/training"
MODES: dict[str, Mode] = {"twin": "twin_lock", "local": "perfusion"}
DEFAULT_KEY_LOCK = "twin"


class PerfusionTrainConcept(io.ComfyNode):
    """A concept learned from a few pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionTrainConcept",
            display_name="Train Concept (Perfusion)",
            category=CATEGORY,
            description="Learns a thing from 4 to 6 pictures. The model itself is not changed. "
            "Cancelling keeps what was learned, in models/perfusion/runs, and training again goes "
            "on from there.",
            search_aliases=["perfusion", "textual inversion", "dreambooth", "personalize"],
            # Pictures of several sizes cannot be one batch; they come as a list.
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to learn with; it stays as it is."),
                clip_input(),
                vae_input(),
                io.Image.Input(
                    "images",
                    tooltip="4 to 6 pictures of the thing in different places: a batch, or a list "
                    "of pictures of any sizes.",
                ),
                superclass_input(),
                io.String.Input(
                    "placeholder",
                    default="<thing>",
                    tooltip="The new word that will stand for the thing in prompts. It must not "
                    "be a word already.",
                ),
                io.Int.Input(
                    "steps",
                    default=200,
                    min=1,
                    max=10000,
                    tooltip="How many times to learn from a batch. The paper uses up to 400.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Pictures per step. More learns more steadily and needs more memory.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=TrainingConfig.learning_rate,
                    min=0.00001,
                    max=1.0,
                    step=0.00001,
                    tooltip="How fast the look of the thing is learned, as a part of the size of "
                    "the model's own values, so that one rate suits every model.",
                ),
                io.Float.Input(
                    "embedding_learning_rate",
                    default=TrainingConfig.embedding_learning_rate,
                    min=0.00001,
                    max=1.0,
                    step=0.00001,
                    tooltip="How fast the new word's vector is learned, as a part of the size of "
                    "the model's own. With the twin lock it is not learned.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Decides prompts, pictures and noise of every step.",
                ),
                CovarianceKind.Input(
                    "covariance",
                    optional=True,
                    tooltip="Statistics of this text encoder from the Measure Covariance node. "
                    "Without them those of the built-in captions are measured, or found when they "
                    "were measured before.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the thing is in each picture; the rest is not learned. "
                    "One for each picture, or one for all. Load Image's MASK is white around the "
                    "thing: put Invert Mask between.",
                ),
                TrainingOptionsKind.Input(
                    "options",
                    optional=True,
                    tooltip="More settings, from the Training Options node.",
                ),
                io.String.Input(
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="What is in each picture, with the placeholder where the thing is "
                    "named: a list, or one a line. Without them built-in sentences are used.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Scores the samples: the concept that is most like the pictures and "
                    "still follows its prompts is returned, instead of the last one.",
                ),
                io.Combo.Input(
                    "key_lock",
                    options=list(MODES),
                    default=DEFAULT_KEY_LOCK,
                    optional=True,
                    tooltip="twin: an everyday word keeps its meaning beside the new one; a prompt "
                    "that does not name the concept gives bit for bit the base model's picture. "
                    "local: as the paper trains; the everyday word may then show the thing, too.",
                ),
            ],
            outputs=[
                ConceptKind.Output(display_name="concept", tooltip="What was learned."),
                LossMapKind.Output(
                    display_name="loss_map",
                    tooltip="The loss after each step for Plot Loss Graph, smoothed for each "
                    "quarter of the noise levels, so that it can be compared between steps.",
                ),
                io.Image.Output(
                    display_name="samples",
                    tooltip="What the concept drew while it was learned: a row for each prompt, a "
                    "column for each sampled step from the first to the last.",
                ),
                io.String.Output(
                    display_name="loss_csv",
                    tooltip="The losses of every step as comma-separated values.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="How training went, where its files are, the memory expected, and with "
                    "clip_vision the score of every sample.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: list[Any],
        clip: list[Any],
        vae: list[Any],
        images: list[Tensor],
        superclass: list[str],
        placeholder: list[str],
        steps: list[int],
        batch_size: list[int],
        learning_rate: list[float],
        embedding_learning_rate: list[float],
        seed: list[int],
        covariance: list[Covariance] | None = None,
        mask: list[Tensor] | None = None,
        options: list[TrainingOptions] | None = None,
        captions: list[str] | None = None,
        clip_vision: list[Any] | None = None,
        key_lock: list[str] | None = None,
    ) -> io.NodeOutput:
        """PERFUSION_CONCEPT, LOSS_MAP, IMAGE, STRING, STRING; samples and report on the node."""
        word = only("placeholder", placeholder).strip()
        text_encoder = only("clip", clip)
        statistics = first_or_none("covariance", covariance)
        count = sum(len(batch) for batch in images)
        config = TrainingConfig(
            placeholder=word,
            superclass=only("superclass", superclass).strip(),
            steps=only("steps", steps),
            batch_size=only("batch_size", batch_size),
            learning_rate=only("learning_rate", learning_rate),
            embedding_learning_rate=only("embedding_learning_rate", embedding_learning_rate),
            seed=only("seed", seed),
            captions=captions_for(captions_of(captions, count), word) if captions else (),
            mode=MODES[first_or_none("key_lock", key_lock) or DEFAULT_KEY_LOCK],
        )
        trained = train(
            Models(only("model", model), text_encoder, only("vae", vae)),
            Material(images, mask, statistics or known_to(text_encoder)),
            config,
            first_or_none("options", options),
            first_or_none("clip_vision", clip_vision),
        )
        record = trained.result.record
        shown = {**ui.PreviewImage(trained.samples).as_dict()}
        shown |= ui.PreviewText(trained.report).as_dict()
        return io.NodeOutput(
            trained.concept,
            {"loss": [means.mean for means in record.smoothed()]},
            trained.samples,
            record.csv(),
            trained.report,
            ui=shown,
        )


class PerfusionCovariance(io.ComfyNode):
    """The statistics of a text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionCovariance",
            display_name="Measure Covariance (Perfusion)",
            category=CATEGORY,
            description="Measures how a text encoder's outputs vary over captions; training needs "
            "it once for each model. The result is kept on disk and found again.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder to measure, as it will be used."),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="Captions to measure on, one a line, a thousand or more. Empty: "
                    "those of the file, or built-in ones.",
                ),
                io.String.Input(
                    "captions_file",
                    default="",
                    optional=True,
                    tooltip="A text file in ComfyUI's input folder with one caption a line, of any "
                    "size. Only used when no captions are written above.",
                ),
                io.Int.Input(
                    "count",
                    default=COUNT,
                    min=100,
                    max=1_000_000,
                    optional=True,
                    tooltip="How many of the built-in captions. More is more exact and takes "
                    "longer; the paper used 100,000.",
                ),
                io.Combo.Input(
                    "positions",
                    options=["words", "all"],
                    default="words",
                    optional=True,
                    tooltip="Which tokens count. words: words and the end token. all: the start "
                    "token and the padding too.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model to train, where a part of it changes encodings before they "
                    "are compared: Anima needs it. With other models it changes nothing and only "
                    "checks that the text encoder belongs to it.",
                ),
            ],
            outputs=[
                CovarianceKind.Output(
                    display_name="covariance", tooltip="The statistics, for Train Concept."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="How many captions and tokens, and the condition number.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        captions: str,
        captions_file: str = "",
        count: int = COUNT,
        positions: Positions = "words",
        model: Any = None,
    ) -> io.NodeOutput:
        """PERFUSION_COVARIANCE, STRING; the report as text on the node."""
        if captions.strip():
            source = of_text(captions)
        elif captions_file.strip():
            source = of_file(captions_file.strip())
        else:
            source = known_to(clip, count)
        covariance = covariance_with_progress(clip, source, positions, model)
        report = describe(covariance)
        return io.NodeOutput(covariance, report, ui=ui.PreviewText(report))
