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

from ...perfusion.gated.rank_one import Part
from ...perfusion.gated.twin_lock import TwinProjections
from ...perfusion.training.denoiser import Batch, Conditioning, Projections
from ..injection.dispatch import Dispatcher, Projection, install
from ..injection.fused import FusedProjection, module_of, share_of
from ..injection.injection import without_bias
from ..models.conditions import extra_conditions, told_with
from ..models.digests import weights_digest
from ..models.families import check_clip, cross_attentions, family_of
from ..models.native_loss import loss_weight, schedule
from ..models.networks import FusedPart
from ..models.query_adapter import adapter_of
from ..pictures.training_images import TrainingImages
from ..text.placeholders import PlaceholderError, is_existing_word
from .checkpointing import checkpoint_blocks
from .differentiable import make_differentiable
from .lengths import rows_by_length
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
from .view_text import TrainingText

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
            make_differentiable(own_model.model.diffusion_model)
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
        self._family = family_of(self._model)
        self._network = self._family.network
        self._current = _Current()
        self._projections: dict[tuple[str, Part], tuple[Dispatcher, Any]] = {}
        self.layers: Mapping[str, int] = self._take_projections()
        self.family: str = self._family.name
        self.text = TrainingText(
            *(clip, superclass, placeholder, self._device, self._dtype), adapter_of(model)
        )
        self.encoder_hash: str = self.text.encoder_hash
        self.data_hash: str = weights_digest(model, f"{pictures.digest} {self._dtype}")
        self._sizes = pictures.sizes
        self._latents = [
            self._latent_in(ordinary(latents)).to(self._device, torch.float32)
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
        self.text.checkpoint()

    def initial_embeddings(self) -> dict[str, Tensor]:
        """Text encoder -> token vector (dim,) of the superclass, the mean over its sub-words."""
        return self.text.initial_embeddings()

    def encode(self, prompts: Sequence[str], embeddings: Mapping[str, Tensor]) -> Conditioning:
        """Encode prompts that each contain the placeholder, with these token vectors."""
        return self.text.encode(prompts, embeddings)

    def encode_superclass(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts that each contain the superclass, the mask on all its sub-words."""
        return self.text.encode_superclass(prompts)

    def random_embeddings(self) -> dict[str, Tensor]:
        """Text encoder -> the random vector (dim,) that names the concept."""
        return self.text.random_embeddings()

    def encode_twins(
        self, prompts: Sequence[str], embeddings: Mapping[str, Tensor]
    ) -> tuple[Conditioning, Conditioning]:
        """Encode prompts as they stand and their twins, the masks on the concept's own token."""
        return self.text.encode_twins(prompts, embeddings)

    def release_text(self) -> None:
        """Unload the text encoders."""
        self.text.release()

    def token_rms(self, encoder: str) -> float:
        """The root mean square of a text encoder's token table."""
        return self.text.token_rms(encoder)

    def project(self, layer: str, part: Part, encodings: Tensor) -> Tensor:
        """Unedited key or value projection (B, N, D) -> (B, N, d) by the layer's own forward.

        Without its bias, which is added whatever an edit does.
        """
        dispatcher, share = self._projections[layer, part]
        original = share_of(dispatcher.original, share)
        encodings = encodings.to(self._device, self._dtype)
        read = self._network.read(self._model.diffusion_model, encodings)
        return without_bias(original, read)

    def errors(self, batch: Batch, encoded: Conditioning, edit: Projections | None) -> Tensor:
        """Squared error (B, C, h, w) of the prediction of x0, times the native loss weight."""
        sampling = self._model.model_sampling
        clean = _chosen(self._latents, batch)
        noise = batch.noise(*clean.shape[1:]).to(clean)
        sigma = schedule(sampling, batch.timesteps).to(self._device)
        noisy = sampling.noise_scaling(sigma, noise, clean)
        size = self._sizes[int(batch.indices[0])]
        # To a model of videos a picture is one of a single frame.
        frames = noisy[:, :, None] if self._network.axes == 5 else noisy
        if self._network.unpadded:
            denoised = torch.empty_like(clean)
            for rows, text, part in rows_by_length(encoded, edit):
                at = rows.to(self._device)
                found = self._denoised(frames[at], sigma[at], text, part, size)
                denoised = denoised.index_copy(0, at, found)
        else:
            denoised = self._denoised(frames, sigma, encoded, edit, size).reshape(clean.shape)
        return (denoised - clean).square() * loss_weight(sampling, sigma)

    def _denoised(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Conditioning,
        edit: Projections | None,
        size: tuple[int, int],
    ) -> Tensor:
        encodings, told = told_with(self._family, text.encodings, text.extra)
        with self._current.holding(edit):
            return self._model.apply_model(
                noisy,
                sigma,
                c_crossattn=encodings,
                transformer_options={"optimized_attention_override": _attention},
                **extra_conditions(self._model, noisy, self._device, told, size),
            )

    def masks(self, batch: Batch) -> Tensor | None:
        """Weights (B, 1, h, w) of the pixels of these images, or None for no masks."""
        return None if self._masks is None else _chosen(self._masks, batch)

    def _latent_in(self, latents: Tensor) -> Tensor:
        """Latents (V, C, h, w) as the model reads them."""
        if self._network.axes == 5:
            return self._model.process_latent_in(latents[:, :, None])[:, :, 0]
        return self._model.process_latent_in(latents)

    def _take_projections(self) -> dict[str, int]:
        layers = {}
        for layer in cross_attentions(self._model):
            layers[layer.name] = layer.value_width
            parts: tuple[tuple[Part, Any], ...] = (("k", layer.to_k), ("v", layer.to_v))
            fused = FusedProjection()
            for name, part in parts:
                behind = self._network.entry is not None
                trained = _Trained(self._current, layer.name, name, behind)
                dispatcher = install(module_of(part))
                if isinstance(part, FusedPart):
                    fused.put(part, trained)
                dispatcher.put(_OWNER, fused if isinstance(part, FusedPart) else trained)
                self._projections[layer.name, name] = dispatcher, part
        return layers


class _Current:
    """The edit in force while the model runs."""

    def __init__(self) -> None:
        self.edit: Projections | None = None

    @contextlib.contextmanager
    def holding(self, edit: Projections | None) -> Iterator[None]:
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

    def __init__(self, current: _Current, layer: str, part: Part, behind: bool) -> None:
        self._current = current
        self._layer = layer
        self._part: Part = part
        self._behind = behind

    def apply(self, original: Projection, encodings: Tensor) -> Tensor:
        edit = self._current.edit
        if edit is None:
            return original(encodings)
        if not self._behind:
            return edit.apply(original, self._layer, self._part)
        if not isinstance(edit, TwinProjections):
            raise ValueError(
                "the model changes the text encodings before its layers read them, where the "
                "local key lock has no place to subtract a direction; train with key_lock twin"
            )
        return edit.apply_behind(original, self._layer, self._part, encodings)


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
