"""Small edit modules, projections and batches for the tests beside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perfusion import (
    Rank1EditModule,
)

WIDTH, FEATURES, TOKENS = 48, 20, 11


def covariance_matrix(seed: int = 3) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    samples = torch.randn(400, WIDTH, generator=random) * torch.logspace(-0.5, 0.5, WIDTH)
    return samples.mT @ samples / 400


def projection(bias: bool = False, features: int = FEATURES) -> nn.Linear:
    return nn.Linear(WIDTH, features, bias=bias)


def ready(module: Rank1EditModule, seed: int = 5) -> Rank1EditModule:
    """A module whose concepts hold known vectors, in eval mode."""
    random = torch.Generator().manual_seed(seed)
    for concept in range(module.num_concepts):
        i, superclass = torch.randn(2, WIDTH, generator=random)
        module.inputs.set(concept, i, superclass)
        if not module.is_key_proj:
            module.set_outputs(concept, torch.randn(FEATURES, generator=random))
    return module.eval()


def train_once(module: Rank1EditModule, seed: int = 1) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    batch = {
        "text_enc": torch.randn(4, TOKENS, WIDTH, generator=random).requires_grad_(),
        "concept_indices": torch.randint(0, TOKENS, (4,), generator=random),
        "text_enc_with_superclass": torch.randn(4, TOKENS, WIDTH, generator=random),
    }
    module(**batch)
    return batch


def batch_for(concept: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """A training batch of one concept."""
    random = torch.Generator().manual_seed(seed)
    return {
        "text_enc": torch.randn(4, TOKENS, WIDTH, generator=random).to(dtype),
        "concept_indices": torch.randint(0, TOKENS, (4,), generator=random),
        "text_enc_with_superclass": torch.randn(4, TOKENS, WIDTH, generator=random).to(dtype),
        "concept_id": concept,
    }
