"""A concept of what a learner holds."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor

from ..concept.concept import Concept
from ..gated.gate import Gate
from .learner import Learner


def learned_concept(learner: Learner, tensors: Mapping[str, Tensor], steps: int) -> Concept:
    """The concept of ``tensors``, which `Learner.tensors` gave after ``steps`` steps."""
    config, denoiser, i = learner.config, learner.denoiser, tensors["i"]

    def learned(kind: str) -> dict[str, Tensor]:
        start = f"learned.{kind}."
        found = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        return {name: tensor.to("cpu", copy=True) for name, tensor in found.items()}

    settings = config.settings() | {"steps": steps, "images": denoiser.image_count}
    return Concept(
        family=denoiser.family,
        placeholder=config.placeholder,
        superclass=config.superclass,
        embeddings=learned("embedding"),
        i=i.float(),
        u=learner.covariance.dual(i).float(),
        superclass_encoding=learner.lock.superclass_encoding.cpu(),
        o_v=learned("v"),
        o_k=learned("k") if config.mode == "trained_keys" else None,
        # Textual inversion is the placeholder's vector alone: an edit of strength 0.
        gate=Gate(strength=1.0 if config.edits else 0.0),
        train_gate=config.gate,
        twin_locked=config.mode == "twin_lock",
        metadata={
            "covariance_hash": learner.covariance.digest,
            "encoder_hash": denoiser.encoder_hash,
            "training": json.dumps(settings, separators=(",", ":")),
        },
    )
