"""Closed-form edits of any model with K/V projections, without ComfyUI (research use).

    encode = prompt_encoder(pipe.tokenizer, pipe.text_encoder)
    edit = edit_model(pipe.unet, encode, "a pack of roses", "a pack of blue roses")
    with edit.applied():
        pipe("a pack of roses")

The model stays as it was; the edit is a value that can be applied, taken back, and saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..text.encoded_prompt import EncodedPrompt, EncodePrompts
from .low_rank import LowRank
from .preserve import Preserved
from .report import EditReport, measure_layer
from .solver import Constraints, SolvedEdit, solve
from .time import RIDGE, time_constraints


@dataclass(frozen=True, eq=False)
class ModelEdit:
    """Changes of a model's projections, by module name, and what they do.

    Attributes:
        projections: module name -> the module whose `weight` (d, D) is changed.
        changes: module name -> its change.
        report: figures of the edit.
    """

    projections: Mapping[str, nn.Module]
    changes: Mapping[str, LowRank]
    report: EditReport

    @torch.no_grad()
    def apply(self, strength: float = 1.0) -> None:
        """Add the changes to the weights for good; a further edit then builds on them."""
        for name, change in self.changes.items():
            weight: Any = self.projections[name].weight
            weight += (strength * change.dense()).to(weight)

    @contextmanager
    def applied(self, strength: float = 1.0) -> Iterator[None]:
        """The changes on the weights within a `with` block; afterwards the same bits as before."""
        weights: dict[str, Any] = {name: self.projections[name].weight for name in self.changes}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            self.apply(strength)
            yield
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(before[name])


def edit_model(
    model: nn.Module,
    encode: EncodePrompts,
    source_prompt: str,
    destination_prompt: str,
    lamb: float = RIDGE,
    with_to_k: bool = True,
    with_augs: bool = True,
    preserved: Preserved | None = None,
) -> ModelEdit:
    """TIME's edit: what the source prompt leaves open becomes what the destination says.

    Args:
        model: with cross-attention modules that own `to_k` and `to_v`, such as diffusers'
            UNet2DConditionModel.
        encode: from `prompt_encoder`, or anything that gives the model's own encodings.
        lamb: the ridge lambda.
        with_to_k: edit the keys besides the values.
        with_augs: edit in the paper's four prompts instead of one.
        preserved: what to hold besides.

    Raises:
        ValueError: for prompts that do not match, and for a model without such projections.
    """
    constraints = time_constraints(encode, source_prompt, destination_prompt, with_augs)
    return edit_with(model, constraints, lamb, with_to_k, preserved)


def edit_with(
    model: nn.Module,
    constraints: Constraints,
    ridge: float,
    with_to_k: bool = True,
    preserved: Preserved | None = None,
) -> ModelEdit:
    """Any builder's constraints on any model; see `edit_model`."""
    projections = find_projections(model, constraints.width, with_to_k)
    edit = solve(constraints, ridge, preserved.prior if preserved else None)
    return changes_of(projections, edit, preserved)


def changes_of(
    projections: Mapping[str, nn.Module], edit: SolvedEdit, preserved: Preserved | None = None
) -> ModelEdit:
    """A solved edit's changes of these projections, with their figures."""
    changes, layers = {}, []
    sample = preserved.sample if preserved else None
    for name, module in projections.items():
        weight: Any = module.weight
        try:
            changes[name] = edit.factors(weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        layers.append(measure_layer(name, weight, changes[name], edit, sample))
    count = len(edit.constraints), int(edit.constraints.moved.sum())
    return ModelEdit(
        projections, changes, EditReport(tuple(layers), count, edit.rank, edit.condition)
    )


def find_projections(model: nn.Module, width: int, with_to_k: bool = True) -> dict[str, nn.Module]:
    """Name -> module of the text's value (and key) projections of a model, in module order.

    Cross-attention is a module that owns `to_k` and `to_v` and is named `attn2` or says
    `is_cross_attention` of itself. Raises ValueError when there is none, and when they read
    encodings of another width.
    """
    parts = ("to_k", "to_v") if with_to_k else ("to_v",)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not all(isinstance(getattr(module, part, None), nn.Module) for part in ("to_k", "to_v")):
            continue
        named = name.rsplit(".", 1)[-1] == "attn2"
        if named or getattr(module, "is_cross_attention", False) is True:
            found |= {f"{name}.{part}": getattr(module, part) for part in parts}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no cross-attention over the text: expected modules named "
            "attn2 (or with is_cross_attention) that own to_k and to_v, found none, so nothing "
            "would be edited. Hand in the UNet itself, not its pipeline; models with joint "
            "attention (Flux, SD3) cannot be edited this way"
        )
    widths = sorted({int(getattr(module, "in_features", 0)) for module in found.values()})
    if widths != [width]:
        raise ValueError(
            f"the model's text projections read encodings {'/'.join(map(str, widths))} wide, the "
            f"text encoder gives {width}; use the text encoder that belongs to the model"
        )
    return found


def prompt_encoder(tokenizer: Any, text_encoder: Any) -> EncodePrompts:
    """An encoder for prompts from a tokenizer and a text encoder of the transformers library.

    Prompts are padded to the tokenizer's length; the last hidden state is used, as Stable Diffusion
    1.x and 2.x do. The tokenizer must give start (if it has one), words, end, padding, in this
    order. Raises ValueError for a prompt that is too long.
    """

    def encode(prompts: Any) -> list[EncodedPrompt]:
        prompts = list(prompts)
        if not prompts:
            return []
        length = tokenizer.model_max_length
        rows: list[list[int]] = tokenizer(prompts, padding="max_length")["input_ids"]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > length:
                raise ValueError(
                    f"the prompt {prompt!r} is too long: expected at most {length} tokens, found "
                    f"{len(row)}; shorten it"
                )
        device = next(text_encoder.parameters()).device
        with torch.no_grad():
            encodings: Tensor = text_encoder(torch.tensor(rows, device=device))[0]
        return [_prompt(tokenizer, *each) for each in zip(prompts, rows, encodings, strict=True)]

    return encode


def _prompt(tokenizer: Any, text: str, row: list[int], encodings: Tensor) -> EncodedPrompt:
    first = int(tokenizer.bos_token_id is not None and row[0] == tokenizer.bos_token_id)
    pieces = [readable(piece) for piece in tokenizer.convert_ids_to_tokens(row)]
    end = row.index(tokenizer.eos_token_id, first)
    return EncodedPrompt(text, tuple(row), tuple(pieces), first, end, encodings.detach())


def readable(piece: str) -> str:
    """A vocabulary entry as `EncodedPrompt.pieces` wants it: the end of a word is a space."""
    return piece.replace("</w>", " ")
