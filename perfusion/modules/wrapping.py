"""Putting edit modules into a network, and those of several networks into one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..gated.covariance import Covariance
from .concept_inputs import ConceptInputs, merge_inputs
from .projections import Rank1EditModule


def make_key_value_proj_rank1_edit_modules_(
    cross_attention: nn.Module,
    *,
    key_proj_name: str,
    value_proj_name: str,
    input_covariance: Tensor | Covariance | None = None,
    inputs: ConceptInputs | None = None,
    **settings: Any,
) -> ConceptInputs:
    """Wrap the two projections of one cross-attention in place.

    Args:
        cross_attention: the module that holds the projections.
        key_proj_name: the name of the key projection in it.
        value_proj_name: the name of the value projection in it.
        input_covariance: C, see `ConceptInputs`.
        inputs: what another attention of the network got returned.
        settings: what else `Rank1EditModule` takes.

    Returns:
        What the two share. Hand it on as ``inputs`` for the network's other attentions, so that
        all follow one ``i`` and compute similarities once.

    Raises:
        TypeError: where a name does not lead to an `nn.Linear`.
        ValueError: for two projections of different widths.
    """
    found: dict[str, nn.Linear] = {}
    for name in (key_proj_name, value_proj_name):
        projection = getattr(cross_attention, name, None)
        if isinstance(projection, Rank1EditModule):
            raise TypeError(f"{name}: expected a projection to wrap, found one wrapped before")
        if not isinstance(projection, nn.Linear):
            raise TypeError(
                f"{name}: expected an nn.Linear in {type(cross_attention).__name__}, found "
                f"{type(projection).__name__}"
            )
        found[name] = projection
    if inputs is None:
        settings["C"] = input_covariance
    elif input_covariance is not None:
        raise TypeError("inputs brings its covariance with it: leave input_covariance out")
    keys = Rank1EditModule(found[key_proj_name], is_key_proj=True, inputs=inputs, **settings)
    values = Rank1EditModule(found[value_proj_name], inputs=keys.inputs)
    setattr(cross_attention, key_proj_name, keys)
    setattr(cross_attention, value_proj_name, values)
    return keys.inputs


def merge_rank1_edit_modules(
    *modules: Rank1EditModule, inputs: ConceptInputs | None = None
) -> Rank1EditModule:
    """One module, in eval mode, with the concepts of several that wrap the same projection.

    Concepts are numbered in order: those of the first module, then those of the second. Call it
    with ``concept_id=(0, 1)`` to use two together; they are combined exactly (Appendix B). To
    share work among layers, hand the ``inputs`` of the first result on to the others.

    Raises:
        ValueError: for no modules, keys mixed with values, concepts that were never trained, and
            projections that differ (with both shapes).
    """
    if not modules:
        raise ValueError("expected at least one module to merge, found none")
    first = modules[0]
    for module in modules:
        if module.is_key_proj != first.is_key_proj:
            raise ValueError("expected either keys or values to merge, found both")
        module.require_started(tuple(range(module.num_concepts)))
        ours, theirs = first.linear.weight, module.linear.weight
        if ours.shape != theirs.shape:
            raise ValueError(
                f"expected modules of one projection, found weights {tuple(ours.shape)} and "
                f"{tuple(theirs.shape)}"
            )
        if ours is not theirs and not torch.equal(ours, theirs.to(ours)):
            raise ValueError(
                "expected modules of one projection, found different weights; the concepts "
                "belong to different networks"
            )
    expected = sum(module.num_concepts for module in modules)
    if inputs is None:
        inputs = merge_inputs(*(module.inputs for module in modules))
    elif inputs.num_concepts != expected:
        raise ValueError(f"inputs: expected {expected} concepts, found {inputs.num_concepts}")
    merged = Rank1EditModule(first.linear, is_key_proj=first.is_key_proj, inputs=inputs)
    outputs = [row for m in modules if m.concept_outputs is not None for row in m.concept_outputs]
    for concept, output in enumerate(outputs):
        merged.set_outputs(concept, output)
    # Not merged.eval(): the projection itself stays in the mode its network is in.
    merged.training = False
    return merged
