"""The edit as modules, for any network with cross-attention over encoded text.

Wrap the key and the value projection of every cross-attention (by hand, or with
`make_key_value_proj_rank1_edit_modules_`), train what `get_finetune_optimizer` collects, and call
``eval()``. Argument names follow perfusion-pytorch, whose users these modules are for; the
numbers come from the same functions as everything else here (`rank_one`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..gated.covariance import Covariance
from ..gated.rank_one import project
from .concept_inputs import ConceptInputs, mean_at, merge_inputs

# Settings of perfusion-pytorch that mean nothing here, and what to do instead.
_REPLACED = {
    "text_seq_len": "sequences of any length are taken, leave it out",
    "default_model": "measure C with calculate_input_covariance and pass C=",
    "frac_gradient_concept_embed": "give the embedding its own rate: "
    "get_finetune_optimizer(model, embedding_lr=...)",
    "multi_concepts_use_cholesky": "several concepts are always combined exactly, leave it out",
    "input_covariance": "here it is called C",
}


class Rank1EditModule(nn.Module):
    """A key or value projection W (d, D) with the gated rank-one edit (Perfusion, eq. 3).

    ``key_or_values_proj`` is an `nn.Linear` from text encodings; it becomes ``linear`` and is
    frozen. A bias of its own is added as ever and takes no part in the edit. With ``is_key_proj``
    the outputs are locked to the superclass, ``o = W e_super``, and nothing here is trained;
    otherwise ``concept_outputs`` (k, d) is the one trainable parameter.

    ``inputs`` is the `ConceptInputs` that the modules of one network share; without it the module
    makes one of its own from ``C``, ``num_concepts`` and ``settings`` (see there).
    ``num_finetune_prompts`` is accepted from early versions of perfusion-pytorch and has no use.

    Raises TypeError for another kind of projection and for settings that exist no more, naming
    what replaced them; ValueError for a covariance or inputs of another width.
    """

    def __init__(
        self,
        key_or_values_proj: nn.Linear,
        *,
        is_key_proj: bool = False,
        C: Tensor | Covariance | None = None,
        num_concepts: int = 1,
        inputs: ConceptInputs | None = None,
        num_finetune_prompts: int | None = None,
        **settings: float,
    ) -> None:
        super().__init__()
        if not isinstance(key_or_values_proj, nn.Linear):
            raise TypeError(
                f"expected the nn.Linear that projects text to keys or values, found "
                f"{type(key_or_values_proj).__name__}"
            )
        for name in settings:
            if name in _REPLACED:
                raise TypeError(f"{name}: {_REPLACED[name]}")
        width = key_or_values_proj.in_features
        if inputs is None:
            inputs = ConceptInputs(width, C=C, num_concepts=num_concepts, **settings)
            inputs.to(key_or_values_proj.weight.device)
        elif C is not None or settings or num_concepts not in (1, inputs.num_concepts):
            raise TypeError("inputs brings C, num_concepts and the gate with it: leave them out")
        if inputs.width != width:
            raise ValueError(
                f"inputs: expected the projection's width {width}, found {inputs.width}; "
                "wrap projections of the same text encodings together"
            )
        self.linear = key_or_values_proj.requires_grad_(False)
        self.is_key_proj = is_key_proj
        self.inputs = inputs
        self.concept_outputs: nn.Parameter | None
        self.outputs_started: Tensor
        if is_key_proj:
            self.register_parameter("concept_outputs", None)
        else:
            # fp32 whatever W has: Adam's steps vanish in half precision.
            start = torch.zeros(
                inputs.num_concepts,
                key_or_values_proj.out_features,
                device=key_or_values_proj.weight.device,
            )
            self.concept_outputs = nn.Parameter(start)
            self.register_buffer("outputs_started", torch.zeros(len(start), dtype=torch.bool))

    @property
    def num_concepts(self) -> int:
        """How many concepts the module holds."""
        return self.inputs.num_concepts

    def forward(
        self,
        text_enc: Tensor,
        *older: Tensor,
        concept_indices: Tensor | None = None,
        text_enc_with_superclass: Tensor | None = None,
        concept_id: int | tuple[int, ...] | None = None,
    ) -> Tensor:
        """The edited projection (B, N, d) of ``text_enc`` (B, N, D), of any length N.

        Training mode: ``concept_indices`` (B,) says at which token each prompt has the concept,
        and ``text_enc_with_superclass`` (B, N, D) are the same prompts with the superclass word
        in that place; it is needed for a concept's first batch and welcome later. Eval mode:
        ``text_enc`` is all there is to give, and ``concept_id`` may name several concepts. Without
        a ``concept_id`` it is concept 0. What is not given is taken from `ConceptInputs.given`.

        The order of early perfusion-pytorch, ``(text_enc, text_enc_with_superclass,
        concept_indices)``, is understood as well.

        Raises ValueError for shapes that do not fit, IndexError for concepts and positions that
        do not exist, and ValueError in eval mode for a concept that was never trained or loaded.
        """
        if older:
            if len(older) != 2 or concept_indices is not None:
                raise TypeError(
                    "expected forward(text_enc, concept_indices=..., text_enc_with_superclass=...)"
                )
            text_enc_with_superclass, concept_indices = older
        given = self.inputs.prompts_for(text_enc)
        if concept_indices is None:
            concept_indices = given.concept_indices
        if text_enc_with_superclass is None:
            text_enc_with_superclass = given.text_enc_with_superclass
        if concept_id is None:
            concept_id = 0 if given.concept_id is None else given.concept_id
        ids = self._checked_ids(concept_id)
        if text_enc.ndim < 2 or text_enc.shape[-1] != self.linear.in_features:
            raise ValueError(
                f"expected text encodings (B, N, {self.linear.in_features}), found "
                f"{tuple(text_enc.shape)}"
            )
        if self.training:
            self._follow(ids, text_enc, concept_indices, text_enc_with_superclass)
        self._require_started(ids)
        inputs, gates = self.inputs.gated(text_enc, ids, self.training)
        return project(self.linear, inputs, gates, self.outputs(ids))

    def outputs(self, ids: tuple[int, ...]) -> Tensor:
        """``o`` (k, d) of these concepts: learned for values, ``W e_super`` for locked keys."""
        if self.concept_outputs is not None:
            return self.concept_outputs[list(ids)]
        return self._projected(self.inputs.superclass_encoding[list(ids)])

    @torch.no_grad()
    def set_outputs(self, concept: int, outputs: Tensor) -> None:
        """Put the outputs (d,) of a concept in place; for a value projection."""
        if self.concept_outputs is None:
            raise TypeError("a key projection is locked: its outputs follow the superclass")
        if outputs.shape != self.concept_outputs[concept].shape:
            raise ValueError(
                f"outputs: expected ({self.linear.out_features},), found {tuple(outputs.shape)}"
            )
        self.concept_outputs[concept] = outputs.to(self.concept_outputs)
        self.outputs_started[concept] = True

    @torch.no_grad()
    def _projected(self, encodings: Tensor) -> Tensor:
        """W e, by the layer's own forward (which may hold a LoRA) and without its bias."""
        encodings = encodings.to(self.linear.weight)
        return self.linear(encodings) - self.linear(torch.zeros_like(encodings))

    def _checked_ids(self, concept_id: int | tuple[int, ...]) -> tuple[int, ...]:
        ids = tuple(concept_id) if isinstance(concept_id, tuple | list) else (concept_id,)
        if self.training and len(ids) != 1:
            raise ValueError(
                f"expected one concept at a time in training, found {ids}; call eval() to use "
                "several"
            )
        if not ids or len(set(ids)) != len(ids):
            raise ValueError(f"concept_id: expected different concepts, found {ids}")
        for one in ids:
            if not 0 <= one < self.num_concepts:
                raise IndexError(
                    f"concept_id: expected 0 to {self.num_concepts - 1} for a module of "
                    f"{self.num_concepts} concept(s), found {one}"
                )
        return ids

    def _follow(
        self,
        ids: tuple[int, ...],
        text_enc: Tensor,
        concept_indices: Tensor | None,
        superclass: Tensor | None,
    ) -> None:
        """Show this batch to the shared inputs, and start the outputs at the superclass."""
        if concept_indices is None:
            raise ValueError(
                "training mode: expected concept_indices (B,), the position of the concept in "
                "each prompt, found none; call eval() for inference"
            )
        if superclass is not None and superclass.shape != text_enc.shape:
            raise ValueError(
                f"expected text_enc_with_superclass of shape {tuple(text_enc.shape)} like "
                f"text_enc, found {tuple(superclass.shape)}"
            )
        places = _checked_places(concept_indices, text_enc)
        superclass_encoding = None if superclass is None else mean_at(superclass, places)
        self.inputs.follow(ids[0], mean_at(text_enc, places), superclass_encoding)
        if self.concept_outputs is not None and not bool(self.outputs_started[ids[0]]):
            start = self._projected(self.inputs.superclass_encoding[list(ids)])
            self.set_outputs(ids[0], start[0])

    def _require_started(self, ids: tuple[int, ...]) -> None:
        for one in ids:
            values_ready = self.concept_outputs is None or bool(self.outputs_started[one])
            if not (bool(self.inputs.initialised[one]) and values_ready):
                raise ValueError(
                    f"concept {one} is empty: expected one that was trained or loaded; call the "
                    "module in training mode first, or use load_modules"
                )


def _checked_places(concept_indices: Tensor, text_enc: Tensor) -> Tensor:
    if text_enc.ndim != 3 or concept_indices.shape != text_enc.shape[:1]:
        raise ValueError(
            f"expected text encodings (B, N, D) and concept_indices (B,), found "
            f"{tuple(text_enc.shape)} and {tuple(concept_indices.shape)}"
        )
    low, high = int(concept_indices.min()), int(concept_indices.max())
    if low < 0 or high >= text_enc.shape[1]:
        raise IndexError(
            f"concept_indices: expected positions 0 to {text_enc.shape[1] - 1} in sequences of "
            f"{text_enc.shape[1]} tokens, found {low} to {high}"
        )
    return concept_indices.to(text_enc.device)


def make_key_value_proj_rank1_edit_modules_(
    cross_attention: nn.Module,
    *,
    key_proj_name: str,
    value_proj_name: str,
    input_covariance: Tensor | Covariance | None = None,
    inputs: ConceptInputs | None = None,
    **settings: Any,
) -> ConceptInputs:
    """Wrap the two projections of one cross-attention in place; returns what they share.

    Hand the returned `ConceptInputs` on as ``inputs`` for the network's other attentions, so that
    all follow one ``i`` and compute similarities once. ``settings`` go to `Rank1EditModule`.
    Raises TypeError where a name does not lead to an `nn.Linear`, ValueError for two projections
    of different widths.
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

    Raises ValueError for no modules, keys mixed with values, concepts that were never trained,
    and projections that differ (with both shapes).
    """
    if not modules:
        raise ValueError("expected at least one module to merge, found none")
    first = modules[0]
    for module in modules:
        if module.is_key_proj != first.is_key_proj:
            raise ValueError("expected either keys or values to merge, found both")
        module._require_started(tuple(range(module.num_concepts)))
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
