"""What a training loop of one's own needs around the modules: optimiser, loss, covariance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..gated.covariance import Covariance, CovarianceAccumulator, Positions
from ..shapes import Encodings, TokenMask
from ..training.losses import masked_mean
from .concept_inputs import ConceptInputs
from .embedding import EmbeddingWrapper
from .projections import Rank1EditModule

Encode = Callable[[Sequence[str]], tuple[Encodings, TokenMask]]


class TextEncoder(Protocol):
    """Something that encodes texts: `OpenClipEmbedWrapper` does."""

    def embed_texts(self, texts: Sequence[str]) -> tuple[Encodings, TokenMask]:
        """The encodings, and a mask of the words and end tokens."""
        ...


def finetune_groups(
    *models: nn.Module, lr: float = 0.03, embedding_lr: float = 0.006
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimiser: value outputs at ``lr``, embeddings slower.

    The rates are the paper's. Hand over every module that holds a part: the network, and the
    text encoder where it is not inside of it.

    Raises:
        ValueError: where there is nothing to train.
    """
    modules = [module for model in models for module in model.modules()]
    outputs = [
        module.concept_outputs
        for module in modules
        if isinstance(module, Rank1EditModule) and module.concept_outputs is not None
    ]
    embeddings = [module.concepts for module in modules if isinstance(module, EmbeddingWrapper)]
    rated = ((_unique(embeddings), embedding_lr), (_unique(outputs), lr))
    groups = [{"params": params, "lr": rate} for params, rate in rated if params]
    if not groups:
        raise ValueError(
            "expected an EmbeddingWrapper or a Rank1EditModule for values to train, found "
            f"neither in {[type(model).__name__ for model in models]}"
        )
    return groups


def get_finetune_parameters(*models: nn.Module) -> list[nn.Parameter]:
    """All trainable parameters of the concepts: value outputs and embeddings.

    Raises:
        ValueError: where there is nothing to train.
    """
    return [parameter for group in finetune_groups(*models) for parameter in group["params"]]


def get_finetune_optimizer(
    *models: nn.Module,
    lr: float = 0.03,
    embedding_lr: float = 0.006,
    betas: tuple[float, float] = (0.9, 0.999),
    wd: float = 0.0,
) -> torch.optim.Optimizer:
    """Adam (AdamW for a weight decay ``wd``) over `finetune_groups`.

    The target inputs of the models then move once per step of this optimiser, towards the mean
    over its batches when gradients of several are accumulated.

    Raises:
        ValueError: where there is nothing to train.
    """
    groups = finetune_groups(*models, lr=lr, embedding_lr=embedding_lr)
    optimizer: torch.optim.Optimizer
    if wd > 0:
        optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=wd)
    else:
        optimizer = torch.optim.Adam(groups, betas=betas)
    modules = [module for model in models for module in model.modules()]
    inputs = [module for module in modules if isinstance(module, ConceptInputs)]
    for one in inputs:
        one.steps_with_optimizer = True

    def end_step(*_: object) -> None:
        for one in inputs:
            one.end_step()

    optimizer.register_step_post_hook(end_step)
    return optimizer


def loss_fn_weighted_by_mask(
    pred: Tensor, target: Tensor, mask: Tensor, normalized_mask_min_value: float = 0.0
) -> Tensor:
    """Squared error of ``pred`` and ``target`` (B, C, ...) where ``mask`` says it matters.

    Each sample is normalised by the sum of its weights. Any number of axes after the channels:
    pictures, sound, motion.

    Args:
        pred: the prediction.
        target: what it should have been.
        mask: (B, ...) or (B, 1, ...), divided by each sample's largest value; weighs once.
        normalized_mask_min_value: the least weight anything keeps.

    Raises:
        ValueError: for shapes that differ (naming them), and for masks with negative or no
            weights.
    """
    if pred.shape != target.shape or pred.ndim < 3:
        raise ValueError(
            f"expected prediction and target of one shape (B, C, ...), found {tuple(pred.shape)} "
            f"and {tuple(target.shape)}"
        )
    if mask.ndim == pred.ndim - 1:
        mask = mask[:, None]
    if mask.shape != (pred.shape[0], 1, *pred.shape[2:]):
        raise ValueError(
            f"expected a mask {(pred.shape[0], *pred.shape[2:])} for predictions "
            f"{tuple(pred.shape)}, found {tuple(mask.shape)}"
        )
    weights = mask.to(torch.float32).flatten(2)
    if not bool(torch.isfinite(weights).all()) or float(weights.min()) < 0:
        raise ValueError("expected a mask of finite weights from 0, found others")
    if normalized_mask_min_value <= 0 and not bool((weights.amax(-1) > 0).all()):
        raise ValueError("expected some weight above 0 in every mask, found a mask of zeros")
    # A mask of zeros with a floor means the floor everywhere.
    weights = torch.where(weights.amax(-1, keepdim=True) > 0, weights, torch.ones_like(weights))
    errors = (pred - target).float().square().flatten(2)[:, :, None]
    return masked_mean(errors, weights[:, :, None], normalized_mask_min_value)


@torch.no_grad()
def calculate_input_covariance(
    encoder: TextEncoder | Encode,
    texts: Sequence[str],
    batch_size: int = 32,
    positions: Positions = "words",
    encoder_hash: str = "unnamed",
) -> Covariance:
    """The covariance C of a text encoder's output over many captions, streamed in fp64.

    Args:
        encoder: an `OpenClipEmbedWrapper`, or anything with ``embed_texts``, or a function:
            texts -> encodings and a mask of the words and end tokens.
        texts: the captions; use at least as many different words as D.
        batch_size: how many are encoded at once.
        positions: which tokens count, see `Covariance`.
        encoder_hash: a name for the encoder.

    Returns:
        What goes to ``C=`` or ``input_covariance=`` as it is; its ``matrix`` is the tensor.

    Raises:
        ValueError: for no texts and for NaN.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError("expected a list of captions, found " + ("one" if texts else "none"))
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    encode = cast("Encode", getattr(encoder, "embed_texts", encoder))
    accumulator: CovarianceAccumulator | None = None
    for start in range(0, len(texts), batch_size):
        encodings, mask = encode(list(texts[start : start + batch_size]))
        if accumulator is None:
            accumulator = CovarianceAccumulator(encodings.shape[-1], positions, encoder_hash)
        accumulator.add(encodings, mask)
    assert accumulator is not None
    return accumulator.result()


def _unique(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return list(dict.fromkeys(parameters))
