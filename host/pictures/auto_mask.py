"""Masks from a model's own attention to a word, while it denoises the pictures once more."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...perfusion.masks.attention import Grid
from ...perfusion.masks.soft_masks import MaskOptions, SoftMasks, overlay, soft_masks
from ...perfusion.text.words import check_phrase
from ..injection.injection import set_injection
from ..models.conditions import extra_conditions
from ..models.families import UnsupportedModelError, check_clip, family_of
from ..models.loaded import pixels_per_latent
from ..models.native_loss import schedule
from ..models.networks import UNET
from ..text.text_encoders import TextEncoders
from .attention_watch import AttentionWatch
from .image_rows import check_images
from .training_images import ImageOptions, encode_images

logger = logging.getLogger("perfusion")

LEVELS = (0.1, 0.3)
"""How far along its noise schedule the model looks at each picture: enough noise that it asks the
text, enough picture left that it sees what is where."""
PROMPT = "a photo of a {}"
# Pixels a side at which edges are looked for.
_EDGES = 512
# Noised versions of a picture in one call: what sampling with guidance takes.
_ROWS = 2


@dataclass(frozen=True)
class AutoMaskOptions:
    """How the model looks, and how masks are made of what it sees.

    Attributes:
        masks: threshold, softness and edges.
        draws: how many times each picture is noised at each of the `LEVELS`.
        resolution: pixels a side of a square picture as the model sees it; others get the same
            area. 0: what the model's family was trained on.
        seed: decides the noise.
        self_attention: whether cells that are alike to the model are made alike in its maps.
    """

    masks: MaskOptions = field(default_factory=MaskOptions)
    draws: int = 2
    resolution: int = 0
    seed: int = 0
    self_attention: bool = True

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws: expected at least 1, found {self.draws}")
        if self.resolution < 0:
            raise ValueError(
                f"resolution: expected 0 or a number of pixels, found {self.resolution}"
            )


@dataclass(frozen=True, eq=False)
class AutoMasks:
    """Masks (B, H, W) in 0..1, pictures (B, H, W, 3) that show them, and a report."""

    masks: Tensor
    overlay: Tensor
    report: str


def auto_mask(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    images: Tensor,
    superclass: str,
    options: AutoMaskOptions | None = None,
) -> AutoMasks:
    """Masks of where a model sees a word in pictures (B, H, W, 3 or 4), 0 to 1.

    The model runs without what other nodes hook into sampling; weight patches count. It is not
    changed. A picture in which the word is looked at about equally everywhere gets a mask of 1
    everywhere, a warning and a line in the report. Interruptible.

    Raises:
        UnsupportedModelError: for a model or CLIP without cross-attention that is known.
        ValueError: for pictures, a word or a VAE that cannot be used.
    """
    options = options or AutoMaskOptions()
    family = family_of(model.model)
    if family.network is not UNET:
        raise UnsupportedModelError(
            f"Auto Mask looks into the attention of UNets, {family.label} is another kind of "
            "network; draw the masks by hand, or let another node make them"
        )
    check_clip(clip, family)
    check_images([images])
    word = superclass.strip()
    pictures = images[..., :3].float().movedim(-1, 1)
    with torch.no_grad():
        prompt = _prompt(clip, word)
        factor = pixels_per_latent(vae)
        side = options.resolution or family.side * factor
        work = _working_size(images.shape[1:3], side, factor * _coarsening(model.model))
        latents = _latents(model, vae, pictures, work)
        maps, cell = _looks(_loaded(model, latents), latents, prompt, work, options)
        # Edges need no more than this; finer ones are the picture's own again.
        shrink = max(1, round(max(work) / _EDGES))
        edges = work[0] // shrink, work[1] // shrink
        found = soft_masks(
            maps.to(pictures.device), pictures, edges, max(1, cell // shrink), options.masks
        )
        shown = overlay(images[..., :3].float(), found.masks)
    report = _report(word, found)
    if not bool(found.found.all()):
        logger.warning("%s", report)
    return AutoMasks(found.masks, shown, report)


@dataclass(frozen=True, eq=False)
class _Prompt:
    """A prompt's encoding (1, N, D), its pooled text, and which of its tokens are the word's."""

    encoding: Tensor
    pooled: Tensor | None
    word: Tensor


def _prompt(clip: CLIP, word: str) -> _Prompt:
    if not word:
        raise ValueError(
            "superclass: expected the everyday word for the thing in the pictures, such as cat or "
            "coffee mug, found nothing"
        )
    check_phrase("superclass", word)
    text = TextEncoders(clip)
    section = text.section(PROMPT.format(word))
    # All encoders of a family cut text into the same words.
    name, found = next(iter(section.items()))
    tokens = [None if isinstance(token, Tensor) else token for token in found]
    wanted = text.word_tokens(name, word)
    starts = [at for at in range(len(tokens)) if tokens[at : at + len(wanted)] == wanted]
    if not wanted or not starts:
        raise ValueError(
            f"the superclass {word!r} is missing from the prompt {PROMPT.format(word)!r} as the "
            "text encoder reads it; write a plain word, no placeholder and no embedding"
        )
    encoded = text.encode([section])
    mask = torch.zeros(encoded.encodings.shape[1], dtype=torch.bool)
    # The last one: the template has words of its own.
    mask[starts[-1] : starts[-1] + len(wanted)] = True
    return _Prompt(encoded.encodings, encoded.pooled, mask)


def _coarsening(model: BaseModel) -> int:
    """How many latent cells a side are one cell of the model's coarsest layers."""
    return 2 ** (len(model.model_config.unet_config["channel_mult"]) - 1)


def _working_size(size: Sequence[int], side: int, step: int) -> Grid:
    """Height and width, multiples of `step`, of about `side` squared pixels in a size's aspect."""
    scale = side / (size[0] * size[1]) ** 0.5
    height, width = (max(1, round(length * scale / step)) * step for length in size)
    return height, width


def _latents(model: ModelPatcher, vae: VAE, pictures: Tensor, work: Grid) -> Tensor:
    """Latents (B, C, h, w) of pictures (B, 3, H, W) at the working size, as the VAE makes them."""
    if pictures.shape[-2:] != work:
        pictures = F.interpolate(
            pictures, work, mode="bicubic", align_corners=False, antialias=True
        ).clamp(0, 1)
    found = encode_images(vae, [pictures.movedim(1, -1)], options=ImageOptions(alpha=False))
    latents = torch.cat(found.latents)
    wanted = model.model.latent_format.latent_channels
    if latents.shape[1] != wanted:
        raise ValueError(
            f"expected a VAE of {wanted} latent channels, as the model has, found "
            f"{latents.shape[1]}; connect the VAE that was loaded together with the model"
        )
    return latents


def _loaded(model: ModelPatcher, latents: Tensor) -> ModelPatcher:
    """A clone of a patcher without applied concepts, loaded as sampling would load it."""
    own = model.clone()
    own.is_injected = False
    set_injection(own, None)
    needed = own.memory_required([_ROWS, *latents.shape[1:]])
    comfy.model_management.load_models_gpu([own], memory_required=needed)
    return own


def _looks(
    own: ModelPatcher, latents: Tensor, prompt: _Prompt, work: Grid, options: AutoMaskOptions
) -> tuple[Tensor, int]:
    """Maps (B, h, w) of the word in all pictures, and the pixels a side of their coarsest cell."""
    model, device = own.model, own.load_device
    clean = model.process_latent_in(latents).to(device, torch.float32)
    sampling = model.model_sampling
    levels = torch.tensor(LEVELS).repeat_interleave(options.draws)
    sigmas = schedule(sampling, levels).to(device)
    progress = comfy.utils.ProgressBar(len(clean) * len(sigmas))
    maps, cell = [], 1
    for at, picture in enumerate(clean):
        # A picture's noise depends on nothing but its place and the seed.
        generator = torch.Generator().manual_seed((options.seed + at) % 2**64)
        noise = torch.randn(len(sigmas), *picture.shape, generator=generator).to(device)
        watch = AttentionWatch(prompt.word, picture.shape[-2], options.self_attention)
        for start in range(0, len(sigmas), _ROWS):
            comfy.model_management.throw_exception_if_processing_interrupted()
            rows = slice(start, start + _ROWS)
            sigma = sigmas[rows]
            noisy = sampling.noise_scaling(
                sigma[:, None, None, None], noise[rows], picture.expand(len(sigma), -1, -1, -1)
            )
            _denoise(model, noisy, sigma, prompt, work, watch)
            progress.update_absolute(at * len(sigmas) + start + len(sigma))
        map_, coarsest = watch.result()
        maps.append(map_.to(latents.device))
        cell = max(1, round(work[0] / coarsest))
    return torch.stack(maps), cell


def _denoise(
    model: BaseModel,
    noisy: Tensor,
    sigma: Tensor,
    prompt: _Prompt,
    work: Grid,
    watch: AttentionWatch,
) -> None:
    rows, device = len(noisy), noisy.device
    pooled = None if prompt.pooled is None else prompt.pooled.expand(rows, -1)
    model.apply_model(
        noisy,
        sigma,
        c_crossattn=prompt.encoding.to(device).expand(rows, -1, -1),
        # No other options: what other nodes put into sampling neither runs nor is disturbed.
        transformer_options=watch.options(),
        **extra_conditions(model, noisy, device, {"pooled_output": pooled}, (work[1], work[0])),
    )


def _report(word: str, found: SoftMasks) -> str:
    covered = found.masks.mean((1, 2)).tolist()
    lines = []
    for at, (share, contrast, good) in enumerate(
        zip(covered, found.contrasts.tolist(), found.found.tolist(), strict=True)
    ):
        if good:
            said = (
                f"{word!r} covers {share:.0%}, looked at {contrast:.1f} times as much as the rest"
            )
        else:
            said = (
                f"{word!r} is looked at about equally everywhere, so all of the picture is in its "
                "mask; use another word for the thing, or paint the mask"
            )
        lines.append(said if len(covered) == 1 else f"image {at}: {said}")
    return "\n".join(lines)
