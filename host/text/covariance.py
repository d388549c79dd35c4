"""Measuring the covariance of a CLIP's encodings over captions, once for each encoder."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ...perfusion.files.safe_file import FileFormatError
from ...perfusion.gated.covariance import Covariance, CovarianceAccumulator, Positions
from ...perfusion.gated.covariance_file import load_covariance, save_covariance
from ..models.families import check_clip, family_of
from ..models.query_adapter import adapter_digest, adapter_of
from .caption_sources import CaptionSource
from .text_encoders import TextEncoders, Tokens, as_long_as

logger = logging.getLogger("perfusion")

BATCH = 32
FOLDER = "perfusion_covariance"

OnProgress = Callable[[int, int], None]


def measure_covariance(
    clip: CLIP,
    captions: Iterable[str],
    on_progress: OnProgress | None = None,
    positions: Positions = "words",
    total: int | None = None,
    model: ModelPatcher | None = None,
) -> Covariance:
    """Second moment of the encodings of captions, batch after batch, in fp64.

    `clip` is measured as it conditions a model: with its clip skip, LoRA and concatenation.
    `positions` "words" counts words and end tokens, "all" also the start token and the padding.
    `on_progress(done, total)` is called after each batch and may raise; `total` is needed for it
    when the captions have no length. `model` is needed where it adapts encodings before it reads
    them. Only one batch of captions is ever held.

    Raises:
        ValueError: when no caption has a word in it.
    """
    if total is None:
        captions = list(captions)
        total = len(captions)
    wanted = (caption for caption in captions if caption.strip())
    text = TextEncoders(clip, None if model is None else adapter_of(model))
    statistics = CovarianceAccumulator(
        text.family.width, positions, text.digest(), text.family.parts
    )
    done = 0
    # A GPU encodes one batch while the CPU takes the words of the next one apart.
    while batch := list(itertools.islice(wanted, BATCH)):
        padded = positions == "all"
        sections = [section for caption in batch for section in _sections(text, caption, padded)]
        # What is not padded to one length is encoded by itself.
        for part in text.of_one_length(sections):
            mask = torch.stack([text.word_mask(section) for section in part])
            with torch.no_grad():
                encodings = text.encode(part).encodings
            statistics.add(encodings, as_long_as(mask, encodings))
        done += len(batch)
        if on_progress is not None:
            on_progress(min(done, total), total)
    if not done:
        raise ValueError("expected captions to measure the covariance on, found none")
    return statistics.result()


def covariance_of(
    clip: CLIP,
    source: CaptionSource,
    on_progress: OnProgress | None = None,
    positions: Positions = "words",
    model: ModelPatcher | None = None,
) -> Covariance:
    """The covariance over a source, from disk when the very same was measured before.

    The same means: encoder weights and patches, layer, captions, positions, and those of the
    `model` where it adapts encodings. A damaged file is measured anew and replaced.

    Raises:
        UnsupportedModelError: for a `clip` that does not belong to the `model`, and for one
            without where the model adapts encodings.
    """
    if model is not None:
        check_clip(clip, family_of(model.model))
    text = TextEncoders(clip)
    adapts = model is not None and bool(text.family.queries)
    more = f" {adapter_digest(model)}" if model is not None and adapts else ""
    path = _path(text.digest(), source, positions, more)
    if path.exists():
        try:
            found = load_covariance(path)
            logger.info("covariance found: %s", path)
            return found
        except FileFormatError as error:
            logger.warning("measuring the covariance again, its file cannot be used: %s", error)
    measured = measure_covariance(
        clip, source.read(), on_progress, positions, source.count, model if adapts else None
    )
    save_covariance(measured, path)
    logger.info("covariance measured: %s, kept in %s", describe(measured), path)
    return measured


def describe(covariance: Covariance) -> str:
    """What a covariance was measured on and how well its solve is conditioned, in one line."""
    counted = "words and end tokens" if covariance.positions == "words" else "all tokens"
    return (
        f"{covariance.captions:,} captions, {covariance.tokens:,} tokens ({counted}), "
        f"{covariance.width} wide, condition number {covariance.condition_number():.3g}"
    )


def register_folder() -> None:
    """Make `models/perfusion_covariance` known to ComfyUI."""
    place = Path(folder_paths.models_dir) / FOLDER
    folder_paths.add_model_folder_path(FOLDER, str(place))


def _path(encoder: str, source: CaptionSource, positions: Positions, more: str) -> Path:
    content = f"{encoder}\n{source.key}\n{positions}{more}"
    key = hashlib.sha256(content.encode()).hexdigest()[:24]
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{encoder}-{key}.safetensors"


def _sections(text: TextEncoders, caption: str, padded: bool) -> list[dict[str, Tokens]]:
    sections = text.sections(caption, padded or text.sectioned)
    count = min(len(found) for found in sections.values())
    return [{name: found[at] for name, found in sections.items()} for at in range(count)]
