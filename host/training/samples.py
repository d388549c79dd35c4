"""Pictures of a concept while it is learned, drawn the way its user will draw them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import comfy.model_management
import comfy.sample
import numpy
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from einops import rearrange
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ...perfusion.concept.concept import Concept
from ..injection.apply import apply_concepts
from ..injection.injection import KEY
from ..models.families import network_of
from ..pictures.thumbnails import UNREADABLE
from .private_copy import unload

# A strip has at most this many steps in it: the first, the last, and some between.
MOST_COLUMNS = 12
SAMPLER, SCHEDULER = "euler", "normal"
_NOTE = "perfusion"


@dataclass(frozen=True)
class SampleSettings:
    """What decides a sample besides the concept; `size` is (height, width) on the latent grid."""

    prompts: tuple[str, ...]
    steps: int
    cfg: float
    seed: int
    size: tuple[int, int]


class Painter:
    """Draws prompts with the private copies of the models that are being trained with.

    `model` and `clip` are the private ones, `vae` is the user's own. Make it in the mode in which
    the user's models are handled (ComfyUI's prompts run under `torch.inference_mode`).
    """

    def __init__(self, vae: VAE) -> None:
        self._vae = vae
        self._mode = torch.is_inference_mode_enabled()

    def draw(
        self,
        model: ModelPatcher,
        clip: CLIP,
        settings: SampleSettings,
        concept: Concept | None,
        text_stays: bool = True,
    ) -> Tensor:
        """A picture for each prompt, uint8 (n, H, W, 3), with the concept or with none.

        Each is what Apply Concepts, CLIPTextEncode, KSampler and VAE Decode make of it, one at a
        time. Leaves weights, gradients and the edit under training as they are; the text encoders
        are unloaded again unless ``text_stays``.
        """
        was_training = comfy.model_management.in_training
        comfy.model_management.in_training = False
        try:
            with torch.no_grad():
                plain = model.clone()
                # Concepts on the user's model take no part in training.
                for key in [key for key in plain.attachments if key.startswith(KEY)]:
                    plain.remove_attachments(key)
                concepts = [] if concept is None else [concept]
                twin = concept is not None and concept.key_lock == "twin"
                edited, words = apply_concepts(plain, clip, concepts, "twin" if twin else "local")
                latents = [_sampled(edited, words, prompt, settings) for prompt in settings.prompts]
                return torch.cat([self._decoded(latent) for latent in latents])
        finally:
            comfy.model_management.in_training = was_training
            needed = [clip.patcher, model] if text_stays else [model]
            if not text_stays:
                unload(clip.patcher)
            # Sampling and decoding may have pushed them out.
            comfy.model_management.load_models_gpu(needed, force_full_load=True)

    def _decoded(self, latent: Tensor) -> Tensor:
        """Pixels uint8 (1, H, W, 3)."""
        vae = self._vae
        # Made here, in the mode of training: what is unloaded in a prompt's mode comes back as
        # inference tensors, through which nothing can be differentiated.
        needed = vae.patcher.model_size() * 1.1 + comfy.model_management.extra_reserved_memory()
        needed += vae.memory_used_decode(latent.shape, vae.vae_dtype)
        needed += comfy.model_management.minimum_inference_memory()
        if not comfy.model_management.is_device_cpu(vae.device):
            comfy.model_management.free_memory(needed, vae.device)
        with torch.inference_mode(self._mode):
            decoded = vae.decode(latent)[..., :3].flatten(0, -4)
            pixels = (decoded * 255).round().clamp(0, 255).to(torch.uint8)
        return pixels.cpu().clone()


def _sampled(model: ModelPatcher, clip: CLIP, prompt: str, settings: SampleSettings) -> Tensor:
    """The latent (1, C, h, w) a KSampler makes of a prompt and an empty negative one."""
    positive, negative = (
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")
    )
    latent_format: Any = model.get_model_object("latent_format")
    # To a model of videos a picture is one of a single frame.
    frames = [1] * (network_of(model.model).axes - 4)
    empty = torch.zeros(1, latent_format.latent_channels, *frames, *settings.size)
    noise = comfy.sample.prepare_noise(empty, settings.seed)
    return comfy.sample.sample(
        model,
        noise,
        settings.steps,
        settings.cfg,
        SAMPLER,
        SCHEDULER,
        positive,
        negative,
        empty,
        disable_pbar=True,
        seed=settings.seed,
    )


class Strip:
    """The samples of a run: a column a step, a row a prompt. Pictures uint8 (n, H, W, 3)."""

    def __init__(self) -> None:
        self.pictures: dict[int, Tensor] = {}

    def picture(self) -> Tensor | None:
        """All in one, (1, n H, steps W, 3) in 0..1; None when there are none."""
        if not self.pictures:
            return None
        steps = sorted(self.pictures)
        if len(steps) > MOST_COLUMNS:
            places = torch.linspace(0, len(steps) - 1, MOST_COLUMNS).round().int().tolist()
            steps = [steps[place] for place in places]
        columns = torch.stack([self.pictures[step] for step in steps])
        return rearrange(columns, "s n h w c -> 1 (n h) (s w) c").float() / 255


def side_by_side(pictures: Tensor) -> Image.Image:
    """Pictures uint8 (n, H, W, 3) in a row, for a preview."""
    return Image.fromarray(rearrange(pictures, "n h w c -> h (n w) c").numpy())


def to_png(pictures: Tensor, settings: SampleSettings) -> bytes:
    """Pictures uint8 (n, H, W, 3) one below the other, with what they were drawn with."""
    note = PngInfo()
    note.add_text(_NOTE, json.dumps(asdict(settings)))
    file = BytesIO()
    image = Image.fromarray(rearrange(pictures, "n h w c -> (n h) w c").numpy())
    image.save(file, "PNG", pnginfo=note)
    return file.getvalue()


def of_png(content: bytes, settings: SampleSettings) -> Tensor | None:
    """What `to_png` kept; None when it was drawn with other settings or is spoiled."""
    try:
        with Image.open(BytesIO(content), formats=("PNG",)) as image:
            if image.info.get(_NOTE) != json.dumps(asdict(settings)):
                return None
            pixels = torch.from_numpy(numpy.array(image.convert("RGB")))
    except UNREADABLE:
        return None
    return rearrange(pixels, "(n h) w c -> n h w c", n=len(settings.prompts))
