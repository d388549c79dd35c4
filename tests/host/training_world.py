"""What tests of the trainer's view share: a view of a model, a batch, an edit of all layers."""

from __future__ import annotations

import torch
from comfyui_perfusion.host.pictures.training_images import encode_images
from comfyui_perfusion.host.training.view import training_view
from comfyui_perfusion.perfusion import Direction, gated_inputs
from comfyui_perfusion.perfusion.gated.gate import Gate
from comfyui_perfusion.perfusion.gated.rank_one import GatedProjections
from comfyui_perfusion.perfusion.training.denoiser import Batch

WORDS = {"superclass": "coffee mug", "placeholder": "<thing>"}


def view_of(world, mask=None, **changes):
    """The view of (model, clip, vae, images)."""
    model, clip, vae, images = world
    pictures = encode_images(vae, [images], None if mask is None else [mask])
    return training_view(model, clip, pictures, **{**WORDS, **changes})


def batch_of(*indices, seed=0):
    """These images, at timesteps from early to late."""
    timesteps = torch.linspace(0.1, 0.9, len(indices))
    return Batch(
        torch.tensor(indices),
        torch.zeros(len(indices), dtype=torch.int64),
        timesteps,
        seed + torch.arange(len(indices)),
    )


def edit_for(view, encoded, trainable=True):
    """An edit of all layers with outputs that can be trained."""
    direction = view.encode_superclass(["a coffee mug"]).encodings[0, 3].detach().double()
    inputs, gates = gated_inputs(
        encoded.encodings, [Direction(direction, direction, Gate(0.7, 0.2))]
    )
    keys = {name: torch.ones(1, width) for name, width in view.layers.items()}
    values = {
        name: torch.full((1, width), 0.5, requires_grad=trainable)
        for name, width in view.layers.items()
    }
    return GatedProjections(inputs, gates, keys, values)


def gradients(view, scale=1.0, images=(0, 1)):
    """The loss and its gradients by name: one step's, as the trainer takes it."""
    vectors = {name: v.requires_grad_(True) for name, v in view.initial_embeddings().items()}
    encoded = view.encode(["a <thing>", "the <thing>"][: len(images)], vectors)
    edit = edit_for(view, encoded)
    loss = view.errors(batch_of(*images), encoded, edit).mean()
    (loss * scale).backward()
    found = {**vectors, **edit.values}
    return loss.detach(), {name: tensor.grad / scale for name, tensor in found.items()}


class Kept:
    """Counts the bytes kept for the backward pass within it, each storage once, no weights."""

    def __init__(self, *modules):
        self._weights = {p.data_ptr() for module in modules for p in module.parameters()}
        self._storages = {}

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *failure):
        self._hooks.__exit__(*failure)

    def _note(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            # Held, so that no other storage gets its address.
            self._storages[storage.data_ptr()] = storage
        return tensor

    @property
    def size(self):
        return sum(storage.nbytes() for storage in self._storages.values())
