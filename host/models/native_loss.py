"""Each prediction type's own loss, from the error of the predicted x0."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling as sampling_types
import torch
from torch import Tensor

from .families import UnsupportedModelError


def schedule(sampling: Any, timesteps: Tensor) -> Tensor:
    """Noise levels sigma (B,) of timesteps (B,) in [0, 1) along the model's own schedule.

    0 is the least noise. The table has one entry per training timestep.
    """
    table = sampling.sigmas
    last = table.shape[0] - 1
    index = (timesteps * table.shape[0]).long().clamp(max=last)
    return table.detach()[index.to(table.device)].float()


def loss_weight(sampling: Any, sigma: Tensor) -> Tensor:
    """What turns the squared x0 error into the native loss, (B, 1, 1, 1) for sigma (B,).

    Predicting the noise or a flow: 1 / sigma^2. Predicting v: (sigma^2 + d^2) / (sigma d)^2 with
    d the standard deviation of the data (1 except for EDM models). Cosmos predicts a flow whose
    time is sigma / (sigma + 1): ((sigma + 1) / sigma)^2.

    Raises:
        UnsupportedModelError: for other prediction types, naming the class and the supported ones.
    """
    squared = sigma.float().square()[:, None, None, None]
    kind = type(sampling)
    # V_PREDICTION derives from EPS, EDM from V_PREDICTION; the most special one comes first.
    if issubclass(kind, sampling_types.V_PREDICTION):
        data = float(torch.as_tensor(sampling.sigma_data)) ** 2
        return (squared + data) / (squared * data)
    if issubclass(kind, sampling_types.COSMOS_RFLOW):
        return (1 + 1 / sigma.float()).square()[:, None, None, None]
    others = sampling_types.X0, sampling_types.IMG_TO_IMG_FLOW
    plain = sampling_types.EPS, sampling_types.CONST
    if issubclass(kind, plain) and not issubclass(kind, others):
        return 1 / squared
    kinds = ", ".join(base.__name__ for base in kind.__bases__)
    raise UnsupportedModelError(
        f"a model that samples by {kinds} cannot be trained; expected noise, v or flow prediction"
    )
