"""Closed-form edits of any model with K/V projections, without ComfyUI (research use).

    encode = prompt_encoder(pipe.tokenizer, pipe.text_encoder)
    edit = edit_model(pipe.unet, encode, "a pack of roses", "a pack of blue roses")
    with edit.applied():
        pipe("a pack of roses")

The model stays as it was; the edit is a value that can be applied, taken back, and saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..shapes import Weight
from ..text.encoded_prompt import EncodePrompts
from .changes import changes_of
from .constraints import Constraints
from .low_rank import LowRank
from .preserve import Preserved
from .report import EditReport
from .solver import solve
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
            weight = _weight(self.projections[name])
            weight += (strength * change.dense()).to(weight)

    @contextmanager
    def applied(self, strength: float = 1.0) -> Iterator[None]:
        """The changes on the weights within a `with` block; afterwards the same bits as before."""
        weights = {name: _weight(self.projections[name]) for name in self.changes}
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
        source_prompt: what leaves something open.
        destination_prompt: the same with words added.
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
    constraints: Constraints | Iterable[Constraints],
    ridge: float,
    with_to_k: bool = True,
    preserved: Preserved | None = None,
) -> ModelEdit:
    """Any builder's constraints on any model; see `edit_model` for the rest.

    Args:
        model: as in `edit_model`.
        constraints: all of them, or parts of them one after the other.
        ridge: lambda.
        with_to_k: edit the keys besides the values.
        preserved: what to hold besides.

    Raises:
        ValueError: for constraints that cannot be met, and for a model without such projections.
    """
    edit = solve(constraints, ridge, preserved.prior if preserved else None)
    projections = find_projections(model, edit.width, with_to_k)
    weights = ((name, _weight(module)) for name, module in projections.items())
    return ModelEdit(projections, *changes_of(weights, edit, preserved))


def find_projections(model: nn.Module, width: int, with_to_k: bool = True) -> dict[str, nn.Module]:
    """Name -> module of the text's value (and key) projections of a model, in module order.

    Cross-attention is a module that owns `to_k` and `to_v` and is named `attn2` or says
    `is_cross_attention` of itself.

    Args:
        model: the network.
        width: D, that of the text encodings.
        with_to_k: the keys besides the values.

    Raises:
        ValueError: when there is none, and when they read encodings of another width.
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


def _weight(module: nn.Module) -> Weight:
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise ValueError(f"expected a projection with a weight, found {type(module).__name__}")
    return weight
