"""The edit as a module, for any network with cross-attention over encoded text.

Wrap the key and the value projection of every cross-attention (by hand, or as `wrapping` does),
train what `get_finetune_optimizer` collects, and call ``eval()``. Argument names follow
perfusion-pytorch, whose users these modules are for; the numbers come from the same functions as
everything else here (`rank_one`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..gated.covariance import Covariance
from ..gated.rank_one import project, without_autocast
from ..shapes import Encodings, Outputs
from .concept_inputs import ConceptInputs
from .kept import Kept
from .precision import moving_only

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

    Args:
        key_or_values_proj: an `nn.Linear` from text encodings; it becomes ``linear`` and is
            frozen. A bias of its own is added as ever and takes no part in the edit.
        is_key_proj: lock the outputs to the superclass, ``o = W e_super``; nothing here is
            trained then. Otherwise ``concept_outputs`` (k, d) is the one trainable parameter.
        C: for inputs of its own, see `ConceptInputs`; so are ``num_concepts`` and ``settings``.
        num_concepts: k.
        inputs: the `ConceptInputs` that the modules of one network share.
        num_finetune_prompts: accepted from early versions of perfusion-pytorch; has no use.
        settings: what else `ConceptInputs` takes.

    Raises:
        TypeError: for another kind of projection and for settings that exist no more, naming
            what replaced them.
        ValueError: for a covariance or inputs of another width.
    """

    concept_outputs: nn.Parameter | None
    outputs_started: Tensor

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
        self._started: Kept[list[bool]] = Kept()
        self._locked: Kept[Tensor] = Kept()
        self._checked: Kept[tuple[int, ...]] = Kept()
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
        text_enc: Encodings,
        *older: Tensor,
        concept_indices: Tensor | None = None,
        text_enc_with_superclass: Encodings | None = None,
        concept_id: int | tuple[int, ...] | None = None,
    ) -> Tensor:
        """The edited projection (B, N, d) of encodings of any length N.

        What is not given is taken from `ConceptInputs.given`. The order of early
        perfusion-pytorch, ``(text_enc, text_enc_with_superclass, concept_indices)``, is
        understood as well.

        Args:
            text_enc: the encodings; in eval mode there is nothing else to give.
            older: the two arguments of the older order.
            concept_indices: (B,), at which token each prompt has the concept; for training.
            text_enc_with_superclass: the same prompts with the superclass word in that place;
                needed for a concept's first batch in training and welcome later.
            concept_id: the concept, 0 unless said, or in eval mode several.

        Raises:
            ValueError: for shapes that do not fit, and in eval mode for a concept that was never
                trained or loaded.
            IndexError: for concepts and positions that do not exist.
        """
        if older:
            if len(older) != 2 or concept_indices is not None:
                raise TypeError(
                    "expected forward(text_enc, concept_indices=..., text_enc_with_superclass=...)"
                )
            text_enc_with_superclass, concept_indices = older
        given = self.inputs.prompts_for(text_enc) if self.training else self.inputs.prompts
        if concept_indices is None:
            concept_indices = given.concept_indices
        if text_enc_with_superclass is None:
            text_enc_with_superclass = given.text_enc_with_superclass
        if concept_id is None:
            concept_id = 0 if given.concept_id is None else given.concept_id
        ids = self._usable(concept_id)
        if text_enc.ndim < 2 or text_enc.shape[-1] != self.linear.in_features:
            raise ValueError(
                f"expected text encodings (B, N, {self.linear.in_features}), found "
                f"{tuple(text_enc.shape)}"
            )
        if self.training:
            self._follow(ids, text_enc, concept_indices, text_enc_with_superclass)
        inputs, gates = self.inputs.gated(text_enc, ids, self.training)
        return project(self.linear, inputs, gates, self.outputs(ids))

    def outputs(self, ids: tuple[int, ...]) -> Outputs:
        """``o`` of these concepts: learned for values, ``W e_super`` for locked keys.

        Locked ones are computed again where W or the superclass's encoding has changed; a change
        through ``.data`` is not seen, call ``inputs.forget()`` after one.
        """
        if self.concept_outputs is not None:
            everything = ids == tuple(range(self.num_concepts))
            return self.concept_outputs if everything else self.concept_outputs[list(ids)]

        def compute() -> Tensor:
            return self._projected(self.inputs.superclass_encoding[list(ids)])

        if not _is_plain(self.linear):
            return compute()
        parameters = [p for p in (self.linear.weight, self.linear.bias) if p is not None]
        sources = (*parameters, self.inputs.superclass_encoding)
        return self._locked.get(sources, compute, (ids, self.inputs.writes))

    @torch.no_grad()
    def set_outputs(self, concept: int, outputs: Tensor) -> None:
        """Put the outputs (d,) of a concept in place; for a value projection.

        Raises:
            TypeError: for a key projection.
            ValueError: for outputs of another shape.
        """
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
        with without_autocast(encodings.device):
            return self.linear(encodings) - self.linear(torch.zeros_like(encodings))

    def _usable(self, concept_id: int | tuple[int, ...]) -> tuple[int, ...]:
        """The concepts' numbers, checked once as long as nothing changes."""
        ids = tuple(concept_id) if isinstance(concept_id, tuple | list) else (concept_id,)

        def check() -> tuple[int, ...]:
            self._check_ids(ids)
            if not self.training:
                self.require_started(ids)
            return ids

        sources = [self.inputs.initialised]
        if self.concept_outputs is not None:
            sources.append(self.outputs_started)
        return self._checked.get(sources, check, (ids, self.training, self.inputs.writes))

    def _check_ids(self, ids: tuple[int, ...]) -> None:
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
        self.inputs.follow(ids[0], text_enc, concept_indices, superclass)
        if self.concept_outputs is not None and not self._outputs_started(ids[0]):
            start = self._projected(self.inputs.superclass_encoding[list(ids)])
            self.set_outputs(ids[0], start[0])

    def _outputs_started(self, concept: int) -> bool:
        if self.concept_outputs is None:
            return True
        started = self.outputs_started
        return self._started.get((started,), started.tolist, self.inputs.writes)[concept]

    def require_started(self, ids: tuple[int, ...]) -> None:
        """Check that these concepts were trained or loaded.

        Raises:
            ValueError: naming the first one that was not.
        """
        for one in ids:
            if not (self.inputs.started(one) and self._outputs_started(one)):
                raise ValueError(
                    f"concept {one} is empty: expected one that was trained or loaded; call the "
                    "module in training mode first, or use load_modules"
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rank1EditModule:
        super()._apply(moving_only(fn, [self.concept_outputs]), recurse)
        return self


def _is_plain(linear: nn.Linear) -> bool:
    """Whether the forward depends on weight and bias alone: no LoRA, no hook."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    return type(linear) is nn.Linear and not hooked
