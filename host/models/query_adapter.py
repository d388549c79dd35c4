"""Models that turn the text encoder's output into the encodings they read by an adapter of theirs.

Anima's adapter asks Qwen's encodings one question for each T5 token of the prompt: the tokens' ids
look up *query* vectors in a table of the adapter's, and what is read has the T5 tokens' positions.
A concept therefore has a second vector, in that table's space, that stands in for the row of a T5
token. What the projections read, and so the space of similarities and gates, is the adapter's
output; it is made once for each conditioning, before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .digests import weights_digest

QUERIES = "perfusion_queries"
"""Where a conditioning keeps its `QueryRows`."""


@dataclass(frozen=True, eq=False)
class QueryRow:
    """A concept's vector in a prompt's queries.

    Attributes:
        position: of the T5 token.
        vector: (dim,) that stands in for the token's row.
        superclass: ids whose mean stands there in the prompt's twin.
    """

    position: int
    vector: Tensor
    superclass: tuple[int, ...]


QueryRows = tuple[QueryRow, ...]


class QueryAdapter:
    """The adapter of one ComfyUI model.

    Args:
        model: Anima's BaseModel, loaded where it will run.
        device: where it runs.
    """

    def __init__(self, model: BaseModel, device: torch.device) -> None:
        self._network: Any = model.diffusion_model
        self._dtype = model.get_dtype_inference()
        self._device = device

    @property
    def module(self) -> Any:
        """The adapter itself."""
        return self._network.llm_adapter

    def rows_of(self, ids: Sequence[int]) -> Tensor:
        """Rows (n, dim) fp32 of the adapter's table."""
        tokens = torch.tensor(list(ids), device=self._device)
        return self.module.embed(tokens, out_dtype=torch.float32).detach().clone()

    def prompt(self, encodings: Tensor, more: Mapping[str, Any], rows: QueryRows) -> Tensor:
        """What is read (1, N, D) of a prompt's encodings (1, M, D), with the concepts' vectors."""
        return self._read(encodings, more, {row.position: row.vector for row in rows})

    def twin(self, encodings: Tensor, more: Mapping[str, Any], rows: QueryRows) -> Tensor:
        """What is read of its twin's encodings, as the model reads it by itself."""
        several = [row for row in rows if len(row.superclass) > 1]
        means = {row.position: self.rows_of(row.superclass).mean(0) for row in several}
        return self._read(encodings, more, means)

    def _read(
        self, encodings: Tensor, more: Mapping[str, Any], vectors: Mapping[int, Tensor]
    ) -> Tensor:
        weights: Tensor = more["t5xxl_weights"][None, :, None].to(encodings)
        with _standing_in(self.module.embed, vectors):
            return self._network.preprocess_text_embeds(
                encodings.to(device=self._device, dtype=self._dtype),
                more["t5xxl_ids"][None].to(device=self._device),
                t5xxl_weights=weights.to(device=self._device, dtype=self._dtype),
            )


def adapter_of(patcher: ModelPatcher) -> QueryAdapter | None:
    """The adapter of a ComfyUI model, which is loaded for it; None for a model without."""
    if not hasattr(getattr(patcher.model, "diffusion_model", None), "llm_adapter"):
        return None
    comfy.model_management.load_models_gpu([patcher])
    return QueryAdapter(patcher.model, patcher.load_device)


def adapter_digest(patcher: ModelPatcher) -> str:
    """16 hexadecimal digits naming a model's adapter and the patches on it."""
    return weights_digest(patcher, within="diffusion_model.llm_adapter.")


def as_condition(encodings: Tensor) -> Any:
    """What the model's `extra_conds` gives for what is read."""
    return comfy.conds.CONDRegular(encodings)


@contextmanager
def _standing_in(table: Any, vectors: Mapping[int, Tensor]) -> Iterator[None]:
    """While it lasts, an embedding table gives these vectors at these positions of a prompt."""
    if not vectors:
        yield
        return
    former, original = vars(table).get("forward"), table.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        found = original(*args, **kwargs)
        columns = list(found.unbind(1))
        for position, vector in vectors.items():
            columns[position] = vector.to(found).expand_as(columns[position])
        return torch.stack(columns, 1)

    vars(table)["forward"] = forward
    try:
        yield
    finally:
        if former is None:
            del vars(table)["forward"]
        else:
            vars(table)["forward"] = former
