"""The weight of the x0 error, beside ComfyUI's own sampling classes."""

from __future__ import annotations

import comfy.supported_models as supported
import pytest
import torch
from comfy import model_base
from comfy.model_base import ModelType
from comfyui_perfusion.host.models.families import UnsupportedModelError
from comfyui_perfusion.host.models.native_loss import loss_weight, schedule

TRAINABLE = (
    ModelType.EPS,
    ModelType.V_PREDICTION,
    ModelType.V_PREDICTION_EDM,
    ModelType.V_PREDICTION_CONTINUOUS,
    ModelType.EDM,
    ModelType.FLOW,
    ModelType.FLUX,
    ModelType.FLOW_COSMOS,
)
OTHERS = (
    ModelType.IMG_TO_IMG,
    ModelType.IMG_TO_IMG_FLOW,
    ModelType.V_PREDICTION_DDPM,
)


def sampling_of(kind):
    return model_base.model_sampling(supported.SD15({}), kind)


@pytest.mark.parametrize("kind", TRAINABLE, ids=lambda kind: kind.name)
def test_the_weighted_error_is_that_of_the_models_output(kind):
    """What the network should have said is what turns, in ComfyUI's formula, into the clean x0."""
    sampling = sampling_of(kind)
    sigma = schedule(sampling, torch.tensor([0.02, 0.3, 0.6, 0.97]))
    generator = torch.Generator().manual_seed(0)
    clean, noise, said = torch.randn(3, 4, 2, 3, 3, generator=generator).double()
    noisy = sampling.noise_scaling(sigma, noise.clone(), clean)

    def denoised(output):
        return sampling.calculate_denoised(sigma, output, noisy)

    # The formula is affine in the output, so two values tell how to invert it.
    zero = denoised(torch.zeros_like(said))
    slope = denoised(torch.ones_like(said)) - zero
    wanted = (clean - zero) / slope
    found = (denoised(said) - clean).square() * loss_weight(sampling, sigma)
    torch.testing.assert_close(found, (said - wanted).square(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", TRAINABLE, ids=lambda kind: kind.name)
def test_later_timesteps_are_noisier(kind):
    sigma = schedule(sampling_of(kind), torch.linspace(0, 1 - 2**-24, 9))
    assert bool((sigma.diff() > 0).all())
    assert bool((sigma > 0).all())


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.name)
def test_what_predicts_something_else_is_refused(kind):
    with pytest.raises(UnsupportedModelError, match="expected noise, v or flow prediction"):
        loss_weight(sampling_of(kind), torch.ones(1))
