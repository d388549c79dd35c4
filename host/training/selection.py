"""Scoring the checkpoints of a training run by their sample pictures, with a CLIP vision model.

How a prompt's likeness is measured depends on the text encoder. A picture and a text can be
compared where both were trained into one space, through the encoder's `text_projection`. ComfyUI
gives every CLIP text model one, but SDXL's g (which conditions on it) is the only one whose
checkpoints always fill it: those of SD1.x and SDXL's l leave it at zero or at whatever was in
memory, unless the encoder was loaded from a file of its own. So it is never trusted but tested:
the training pictures must be closer to their own word than to any of two dozen others. Where that
fails, pictures stand in for the prompts: those the superclass draws for the same prompts and seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from torch import Tensor

from ...perfusion.concept.concept import Concept
from ...perfusion.training.scores import (
    Score,
    best,
    mean_similarity,
    paired_similarity,
    table,
    unit,
)
from ..models.families import encoder_models
from ..text.text_encoders import TextEncoders

# Pictures and prompts embedded at once.
_TOGETHER = 8
# Seldom anybody's personal thing, so that a right answer is not beaten by a synonym.
_OTHER_WORDS = (
    *("airplane", "bridge", "mountain", "river", "newspaper", "guitar", "pizza", "train"),
    *("umbrella", "castle", "keyboard", "tractor", "lighthouse", "staircase", "sandwich"),
    *("traffic light", "fireplace", "waterfall", "helicopter", "piano", "carrot", "skyscraper"),
    *("tennis racket", "toothbrush"),
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A concept after `step` steps and what it draws: `pictures` (n, H, W, 3) in 0..1."""

    step: int
    concept: Concept
    pictures: Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """The best checkpoint, the score of each, and a table with an explanation for a person."""

    best: Checkpoint
    scores: tuple[Score, ...]
    report: str


@torch.no_grad()
def score_checkpoints(
    clip_vision: ClipVisionModel,
    clip: CLIP,
    checkpoints: Sequence[Checkpoint],
    images: Iterable[Tensor],
    prompts: Sequence[str],
    plain: Tensor,
) -> Selection:
    """Choose the best checkpoint by the rule of `perfusion.scores`.

    `clip_vision` and `clip` are ComfyUI's ClipVisionModel and CLIP, the latter without concepts.
    `images` are the training pictures, each (H, W, 3) or (B, H, W, 3) in 0..1. `prompts` are those
    of each checkpoint's pictures, in their order and with the placeholder. `plain` (n, H, W, 3) is
    what the model draws for the same prompts and seeds with the superclass in its place. May be
    interrupted.

    Raises:
        ValueError: for no checkpoints, for pictures that do not match the prompts, and for NaN.
    """
    _check(checkpoints, prompts, plain)
    concept = checkpoints[0].concept
    rows = [_embed(clip_vision, picture, "the training pictures") for picture in images]
    if not rows:
        raise ValueError("expected at least one training picture to compare with, found none")
    training = torch.cat(rows)
    drawn = _embed(clip_vision, plain, "the superclass's pictures")
    asked = [prompt.replace(concept.placeholder, concept.superclass) for prompt in prompts]
    encoder = _shared_space(clip_vision, clip, training, concept.superclass)
    wanted = drawn if encoder is None else _embed_texts(clip, encoder, asked)

    def score(step: int, embeddings: Tensor) -> Score:
        image = mean_similarity(embeddings, training)
        return Score(step, image, paired_similarity(embeddings, wanted))

    scores = [
        score(c.step, _embed(clip_vision, c.pictures, f"the pictures of step {c.step}"))
        for c in checkpoints
    ]
    chosen = best(scores)
    report = "\n".join([table(scores, score(0, drawn)), *_explanation(encoder)])
    return Selection(checkpoints[scores.index(chosen)], tuple(scores), report)


def _explanation(encoder: str | None) -> list[str]:
    if encoder is None:
        prompt = (
            "with the pictures the superclass draws for the same prompts and seeds (no text "
            "encoder in use shares a space with the CLIP vision model)"
        )
    else:
        prompt = f"with the prompts as the text encoder clip_{encoder} reads them"
    return [
        "image: mean cosine of the sample pictures with the training pictures",
        f"prompt: mean cosine {prompt}",
        "both: their geometric mean; the largest is chosen, of equal ones the earliest",
        "plain: the pictures of the superclass alone, for comparison",
    ]


def _check(checkpoints: Sequence[Checkpoint], prompts: Sequence[str], plain: Tensor) -> None:
    if not checkpoints:
        raise ValueError("expected at least one checkpoint to choose from, found none")
    rows = [(f"the checkpoint of step {c.step}", c.pictures) for c in checkpoints]
    for name, pictures in [*rows, ("the plain superclass", plain)]:
        if pictures.ndim != 4 or len(pictures) != len(prompts) or not prompts:
            raise ValueError(
                f"expected a picture for each of the {len(prompts)} prompts of {name}, found "
                f"{tuple(pictures.shape)}"
            )


def _embed(clip_vision: ClipVisionModel, pictures: Tensor, name: str) -> Tensor:
    """Embeddings (n, d) fp32 of pictures (H, W, C) or (n, H, W, C)."""
    rows = pictures[None] if pictures.ndim == 3 else pictures
    found = []
    for some in rows.split(_TOGETHER):
        comfy.model_management.throw_exception_if_processing_interrupted()
        embeddings = clip_vision.encode_image(some[..., :3])["image_embeds"].float().cpu()
        if not bool(torch.isfinite(embeddings).all()):
            raise ValueError(
                f"the CLIP vision model made NaN or infinity of {name}; look at them, or leave "
                "clip_vision unconnected to keep the last checkpoint"
            )
        # SigLIP has one for each patch instead of one for the picture.
        found.append(embeddings.mean(1) if embeddings.ndim == 3 else embeddings)
    return torch.cat(found)


def _embed_texts(clip: CLIP, name: str, prompts: Sequence[str]) -> Tensor:
    """What one text encoder projects prompts to, (n, d) fp32.

    Of a prompt beyond 75 tokens the first 75 count: CLIP reads no more at once.
    """
    text = TextEncoders(clip)
    model = encoder_models(clip)[name]
    # SD1's encoder leaves the projection out unless told otherwise.
    model.set_clip_options({"projected_pooled": True})
    try:
        sections = [text.sections(prompt)[name][0] for prompt in prompts]
        found = []
        for start in range(0, len(sections), _TOGETHER):
            comfy.model_management.throw_exception_if_processing_interrupted()
            _, pooled = model.encode(sections[start : start + _TOGETHER])
            found.append(pooled.float().cpu())
    finally:
        clip.cond_stage_model.reset_clip_options()
    return torch.cat(found)


def _shared_space(
    clip_vision: ClipVisionModel, clip: CLIP, training: Tensor, superclass: str
) -> str | None:
    """The text encoder whose projection and the vision model's share a space, or None."""
    if clip_vision.model_type != "clip_vision_model":
        return None
    own = set(superclass.lower().split())
    words = [superclass, *(w for w in _OTHER_WORDS if not own & set(w.split()))]
    for name, model in encoder_models(clip).items():
        projection = getattr(model.transformer, "text_projection", None)
        if projection is None or projection.out_features != training.shape[1]:
            continue
        texts = _embed_texts(clip, name, [f"a photo of a {word}" for word in words])
        lengths = texts.norm(dim=1)
        if not (bool(torch.isfinite(lengths).all()) and float(lengths.min()) > 0):
            continue
        likeness = unit(texts) @ unit(training).mean(0)
        if int(likeness.argmax()) == 0:
            return name
    return None
