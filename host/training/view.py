"""A MODEL, CLIP and VAE with training pictures, as the method's `Denoiser` sees them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor

from ...perfusion.gated.rank_one import GatedProjections, Part
from ...perfusion.training.denoiser import Batch, Conditioning
from ..injection.dispatch import Projection, install
from ..models.conditions import extra_conditions
from ..models.digests import weights_digest
from ..models.families import check_clip, cross_attentions, family_of
from ..models.native_loss import loss_weight, schedule
from ..pictures.training_images import TrainingImages
from ..text.placeholders import PlaceholderError, is_existing_word, serve_vectors
from ..text.text_encoders import TextEncoders, Tokens
from .checkpointing import checkpoint_blocks
from .private_copy import (
    Precision,
    compute_in,
    ordinary,
    private_clip,
    private_patcher,
    training_dtype,
    unload,
)
from .repeatable import repeatable

_OWNER = 0


@contextlib.contextmanager
def training_view(
    model: ModelPatcher,
    clip: CLIP,
    pictures: TrainingImages,
    superclass: str,
    placeholder: str,
    precision: Precision = "auto",
    gradient_checkpointing: bool = False,
) -> Iterator[TrainingView]:
    """A `Denoiser` over private copies; everything is as before afterwards, whatever happens.

    `pictures` are what `encode_images` made. `precision` is what the model computes in
    (`training_dtype`). With `gradient_checkpointing` activations are computed again in the
    backward pass instead of being kept: less memory, more time, the same gradients. Within the
    context autograd is on, whatever the caller's mode.

    Raises:
        ValueError: for a superclass or a placeholder that cannot be used.
        UnsupportedModelError: for a model or CLIP that cannot be trained on.
    """
    check_training(model, clip, superclass, placeholder)
    was_training = comfy.model_management.in_training
    private: list[ModelPatcher] = []
    # The user's own models are handled in the caller's mode, in which their weights were made.
    for patcher in (clip.patcher, model):
        unload(patcher)
    with torch.inference_mode(False), torch.enable_grad(), repeatable(model.load_device):
        try:
            own_clip = private_clip(clip)
            private.append(own_clip.patcher)
            own_model = private_patcher(model)
            private.append(own_model)
            compute_in(own_model, training_dtype(own_model, precision))
            comfy.model_management.in_training = True
            comfy.model_management.load_models_gpu(private, force_full_load=True)
            view = TrainingView(own_model, own_clip, pictures, superclass, placeholder)
            if gradient_checkpointing:
                view.checkpoint()
            yield view
        finally:
            comfy.model_management.in_training = was_training
            for patcher in private:
                unload(patcher)
                patcher.cleanup()


class TrainingView:
    """Implements `perfusion.denoiser.Denoiser`; made by `training_view`."""

    def __init__(
        self,
        model: ModelPatcher,
        clip: CLIP,
        pictures: TrainingImages,
        superclass: str,
        placeholder: str,
    ) -> None:
        # The private copies themselves, for whoever draws with them.
        self.patcher = model
        self.clip = clip
        self._model = model.model
        self._device = model.load_device
        self._dtype = self._model.get_dtype_inference()
        self._superclass = superclass
        self._placeholder = placeholder
        self._current = _Current()
        self._projections: dict[tuple[str, Part], Any] = {}
        self.layers: Mapping[str, int] = self._take_projections()
        self.family: str = family_of(self._model).name
        self._text = TextEncoders(clip)
        self.encoder_hash: str = self._text.digest()
        self._own_words = {
            name: self._text.word_tokens(name, superclass) for name in self._text.family.encoders
        }
        marker = {name: torch.zeros(width) for name, width in self._text.family.encoders.items()}
        self._marked = TextEncoders(serve_vectors(clip, placeholder, marker))
        self._sections: dict[str, dict[str, Tokens]] = {}
        self.data_hash: str = weights_digest(model, f"{pictures.digest} {self._dtype}")
        self._sizes = pictures.sizes
        self._latents = [
            self._model.process_latent_in(ordinary(latents)).to(self._device, torch.float32)
            for latents in pictures.latents
        ]
        masks = pictures.masks
        self._masks = masks and [ordinary(mask).to(self._device) for mask in masks]

    @property
    def image_count(self) -> int:
        """How many training images there are."""
        return len(self._latents)

    @property
    def variant_count(self) -> int:
        """How many augmented versions there are of each image."""
        return self._latents[0].shape[0]

    @property
    def needs_scaling(self) -> bool:
        """Whether gradients are computed in fp16."""
        return self._dtype is torch.float16

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width of an image on the latent grid."""
        height, width = self._latents[index].shape[-2:]
        return height, width

    def checkpoint(self) -> None:
        """Compute blocks of the model and of the text encoders again in the backward pass."""
        # The backward pass comes after `errors`, so the second run brings its edit along.
        checkpoint_blocks(self._model.diffusion_model, self._current.again)
        checkpoint_blocks(self._text.clip.cond_stage_model)

    def initial_embeddings(self) -> dict[str, Tensor]:
        """Text encoder -> token vector (dim,) of the superclass, the mean over its sub-words."""
        return {
            name: self._text.token_vectors(name, tokens).mean(0)
            for name, tokens in self._own_words.items()
        }

    def encode(self, prompts: Sequence[str], embeddings: Mapping[str, Tensor]) -> Conditioning:
        """Encode prompts that each contain the placeholder, with these token vectors."""
        batch, masks = [], []
        for prompt in prompts:
            section = self._section(self._marked, prompt)
            batch.append(
                {
                    name: [embeddings[name] if isinstance(t, Tensor) else t for t in tokens]
                    for name, tokens in section.items()
                }
            )
            masks.append([isinstance(token, Tensor) for token in next(iter(section.values()))])
            if not any(masks[-1]):
                raise ValueError(
                    f"the placeholder {self._placeholder!r} is missing from the prompt {prompt!r}; "
                    "every training prompt must contain it"
                )
        return self._encode(batch, torch.tensor(masks))

    def encode_superclass(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts that each contain the superclass, the mask on all its sub-words."""
        batch, masks = [], []
        for prompt in prompts:
            section = self._section(self._text, prompt)
            name, tokens = next(iter(section.items()))
            word = self._own_words[name]
            starts = [at for at in range(len(tokens)) if tokens[at : at + len(word)] == word]
            if not starts:
                raise ValueError(
                    f"the superclass {self._superclass!r} is missing from the prompt {prompt!r}; "
                    "every training prompt must contain it"
                )
            positions = range(starts[0], starts[0] + len(word))
            masks.append([at in positions for at in range(len(tokens))])
            batch.append(section)
        return self._encode(batch, torch.tensor(masks))

    def project(self, layer: str, part: Part, encodings: Tensor) -> Tensor:
        """Unedited key or value projection (B, N, D) -> (B, N, d) by the layer's own forward."""
        original: Projection = self._projections[layer, part].original
        return original(encodings.to(self._device, self._dtype))

    def errors(self, batch: Batch, encoded: Conditioning, edit: GatedProjections | None) -> Tensor:
        """Squared error (B, C, h, w) of the prediction of x0, times the native loss weight."""
        sampling = self._model.model_sampling
        clean = _chosen(self._latents, batch)
        noise = batch.noise(*clean.shape[1:]).to(clean)
        sigma = schedule(sampling, batch.timesteps).to(self._device)
        noisy = sampling.noise_scaling(sigma, noise, clean)
        size = self._sizes[int(batch.indices[0])]
        with self._current.holding(edit):
            denoised = self._model.apply_model(
                noisy,
                sigma,
                c_crossattn=encoded.encodings,
                transformer_options={"optimized_attention_override": _attention},
                **extra_conditions(self._model, noisy, self._device, encoded.extra, size),
            )
        return (denoised - clean).square() * loss_weight(sampling, sigma)

    def masks(self, batch: Batch) -> Tensor | None:
        """Weights (B, 1, h, w) of the pixels of these images, or None for no masks."""
        return None if self._masks is None else _chosen(self._masks, batch)

    def _take_projections(self) -> dict[str, int]:
        layers = {}
        for layer in cross_attentions(self._model):
            layers[layer.name] = layer.value_width
            parts: tuple[tuple[Part, Any], ...] = (("k", layer.to_k), ("v", layer.to_v))
            for part, module in parts:
                dispatcher = install(module)
                dispatcher.put(_OWNER, _Trained(self._current, layer.name, part))
                self._projections[layer.name, part] = dispatcher
        return layers

    def _section(self, text: TextEncoders, prompt: str) -> dict[str, Tokens]:
        if prompt not in self._sections:
            self._sections[prompt] = text.section(prompt)
        return self._sections[prompt]

    def _encode(self, batch: list[dict[str, Tokens]], mask: Tensor) -> Conditioning:
        found = self._text.encode(batch)
        # What the projections will read at inference is what the gate must be trained on.
        encodings = found.encodings.to(self._device, self._dtype)
        return Conditioning(encodings, mask[:, : encodings.shape[1]], found.pooled)


class _Current:
    """The edit in force while the model runs."""

    def __init__(self) -> None:
        self.edit: GatedProjections | None = None

    @contextlib.contextmanager
    def holding(self, edit: GatedProjections | None) -> Iterator[None]:
        """Put an edit in force for a while."""
        before, self.edit = self.edit, edit
        try:
            yield
        finally:
            self.edit = before

    def again(self) -> contextlib.AbstractContextManager[None]:
        """What puts the edit of now in force again, later."""
        return self.holding(self.edit)


class _Trained:
    """The edit under training in one projection."""

    def __init__(self, current: _Current, layer: str, part: Part) -> None:
        self._current = current
        self._layer = layer
        self._part: Part = part

    def apply(self, original: Projection, encodings: Tensor) -> Tensor:
        edit = self._current.edit
        if edit is None:
            return original(encodings)
        return edit.apply(original, self._layer, self._part)


def _chosen(images: list[Tensor], batch: Batch) -> Tensor:
    """The chosen variants of the chosen images, all of one shape, as one batch."""
    pairs = zip(batch.indices.tolist(), batch.variants.tolist(), strict=True)
    return torch.stack([images[index][variant] for index, variant in pairs])


def _attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    # ComfyUI's choice for the CPU trades time for memory; with gradients it has neither.
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def check_training(model: ModelPatcher, clip: CLIP, superclass: str, placeholder: str) -> None:
    """Make sure a model, its CLIP and these words can be trained with.

    Raises:
        UnsupportedModelError: for a model or CLIP that cannot be trained on.
        PlaceholderError: for a placeholder that is a word already or part of the superclass.
    """
    check_clip(clip, family_of(model.model))
    loss_weight(model.get_model_object("model_sampling"), torch.ones(1))
    if is_existing_word(clip, placeholder):
        raise PlaceholderError(
            f"the placeholder {placeholder!r} is a word the model already knows, and prompts could "
            f"no longer use it; choose another, for instance <{placeholder}>"
        )
    if placeholder.lower() in superclass.lower():
        raise PlaceholderError(
            f"the placeholder {placeholder!r} is part of the superclass {superclass!r}; choose "
            "another placeholder"
        )
