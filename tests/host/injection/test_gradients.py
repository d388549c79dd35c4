"""Gradients through a real UNet and text encoder beside finite differences, all in fp64."""

from __future__ import annotations

import pytest
import torch
from comfyui_perfusion.host.pictures.training_images import encode_images
from comfyui_perfusion.host.training.view import training_view
from torch.overrides import TorchFunctionMode

from tests.host.training_world import WORDS, batch_of, edit_for

# Of a loss computed to 1e-15 by steps of 1e-4: 1e-11 from rounding, 1e-8 from curvature.
STEP, AGREEMENT = 1e-4, 1e-6


class InDouble(TorchFunctionMode):
    """Whatever asks for fp32 gets fp64: ComfyUI's own code, with nothing else changed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


@pytest.fixture(scope="module", params=["sd1_light", "sdxl_light"])
def world(worlds, request):
    """A model and text encoders in fp64, the VAE, and two pictures."""
    images = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    model, clip = worlds.new_model(request.param), worlds.new_clip(request.param[:-6])
    model.model.diffusion_model.double().dtype = torch.float64
    clip.cond_stage_model.double()
    return model, clip, worlds.vae(), images


class Problem:
    """The loss as a function of token vectors and outputs, and where to take its gradient."""

    def __init__(self, view):
        self.view = view
        self.vectors = list(view.initial_embeddings())
        start = {name: v.double() for name, v in view.initial_embeddings().items()}
        self.outputs = list(edit_for(view, view.encode(["a <thing>"], start)).values)
        generator = torch.Generator().manual_seed(1)
        for name in self.outputs:
            start[name] = torch.randn(1, view.layers[name], generator=generator).double()
        self.start = start

    def loss(self, point):
        vectors = {name: point[name] for name in self.vectors}
        encoded = self.view.encode(["a <thing>"], vectors)
        edit = edit_for(self.view, encoded)
        edit.values.update({name: point[name] for name in self.outputs})
        errors = self.view.errors(batch_of(1), encoded, edit)
        assert encoded.encodings.dtype is errors.dtype is torch.float64
        return errors.mean()

    def slope_along(self, ways):
        """By differences."""
        with torch.no_grad():
            moved = [
                {n: at + sign * STEP * ways[n] if n in ways else at for n, at in self.start.items()}
                for sign in (1, -1)
            ]
            ahead, behind = (float(self.loss(point)) for point in moved)
        return (ahead - behind) / (2 * STEP)


def test_gradients_agree_with_finite_differences(world):
    model, clip, vae, images = world
    pictures = encode_images(vae, [images])
    with (
        InDouble(),
        training_view(model, clip, pictures, **WORDS) as view,
    ):
        problem = Problem(view)
        point = {name: at.clone().requires_grad_(True) for name, at in problem.start.items()}
        problem.loss(point).backward()
        generator = torch.Generator().manual_seed(2)
        for names in (*([name] for name in problem.vectors), problem.outputs[:1], problem.outputs):
            ways = {
                name: torch.randn(point[name].shape, generator=generator).double() for name in names
            }
            slope = sum(float((point[name].grad * way).sum()) for name, way in ways.items())
            assert slope != 0
            assert slope == pytest.approx(problem.slope_along(ways), rel=AGREEMENT), names
