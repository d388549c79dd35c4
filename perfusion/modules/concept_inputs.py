"""What the edit modules of one network share: target inputs, their duals, superclass encodings.

The method keeps one ``i`` per concept, not one per layer (method section 3). `ConceptInputs` is
that one place: it follows the concept's encoding once per training step however often a layer's
forward runs, and it computes ``e - s i`` and the gates once per encoding for all layers.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..gated.covariance import Covariance
from ..gated.gate import Gate
from ..gated.rank_one import Basis, Direction, combine, gated_inputs
from .metric import Metric, as_metric

logger = logging.getLogger("perfusion")

_FLOATS = ("i", "u", "superclass_encoding", "gates")


@dataclass(frozen=True, eq=False)
class Prompts:
    """Where the concept stands in the prompts now going through a network (see `given`)."""

    concept_indices: Tensor | None = None
    text_enc_with_superclass: Tensor | None = None
    concept_id: int | tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class _Following:
    """The averages before the present step, and the encodings (D,) that step saw."""

    i: Tensor
    superclass: Tensor
    newest: Tensor
    newest_superclass: Tensor | None


class ConceptInputs(nn.Module):
    """The inputs of ``num_concepts`` concepts over text encodings of ``width`` D.

    ``C`` is the second moment of the encodings: a `Covariance`, a matrix (D, D), or None for the
    plain scalar product (worse: rare directions of the text then open the gate as easily as
    common ones). ``input_decay`` is the decay of the average that ``i`` is, per training step.
    ``train_beta`` and ``train_temperature`` shape the gate in training, ``eval_beta`` and
    ``eval_temperature`` at inference.

    Buffers, fp32 whatever the network is cast to: ``i``, ``u`` and ``superclass_encoding``
    (k, D), ``gates`` (k, 3) with bias, temperature and strength at inference, ``initialised``
    (k,) bool. Raises ValueError for settings the formulas cannot take.
    """

    def __init__(
        self,
        width: int,
        *,
        C: Tensor | Covariance | None = None,
        num_concepts: int = 1,
        input_decay: float = 0.99,
        train_beta: float = 0.75,
        train_temperature: float = 0.1,
        eval_beta: float = 0.65,
        eval_temperature: float = 0.15,
    ) -> None:
        super().__init__()
        if num_concepts < 1:
            raise ValueError(f"num_concepts: expected at least 1, found {num_concepts}")
        if not 0 <= input_decay <= 1:
            raise ValueError(f"input_decay: expected 0 to 1, found {input_decay}")
        self.metric: Metric | None = None if C is None else as_metric(C, width)
        self.input_decay = input_decay
        self.train_gate = Gate(train_beta, train_temperature)
        self.i: Tensor
        self.u: Tensor
        self.superclass_encoding: Tensor
        self.gates: Tensor
        self.initialised: Tensor
        for name in ("i", "u", "superclass_encoding"):
            self.register_buffer(name, torch.zeros(num_concepts, width))
        gate = Gate(eval_beta, eval_temperature)
        self.register_buffer("gates", torch.tensor([astuple(gate)]).repeat(num_concepts, 1))
        self.register_buffer("initialised", torch.zeros(num_concepts, dtype=torch.bool))
        # Set where an optimiser says when a step is over; else another encoding says so.
        self.steps_with_optimizer = False
        self.prompts = Prompts()
        self._recent = Prompts()
        self._following: dict[int, _Following] = {}
        self._bases: dict[tuple[tuple[int, ...], bool], Basis] = {}
        self._latest: tuple[Any, ...] | None = None

    @property
    def num_concepts(self) -> int:
        """k."""
        return self.i.shape[0]

    @property
    def width(self) -> int:
        """D."""
        return self.i.shape[1]

    def set(
        self,
        concept: int,
        i: Tensor,
        superclass_encoding: Tensor,
        u: Tensor | None = None,
        gate: Gate | None = None,
    ) -> None:
        """Put a concept in place: ``i``, ``superclass_encoding`` and ``u`` (D,), gate at inference.

        Without ``u`` it is C^-1 i. Raises ValueError for vectors of another width.
        """
        for name, vector in (("i", i), ("superclass_encoding", superclass_encoding), ("u", u)):
            if vector is not None and vector.shape != (self.width,):
                raise ValueError(f"{name}: expected ({self.width},), found {tuple(vector.shape)}")
        with torch.no_grad():
            self.i[concept] = i.to(self.i)
            self.u[concept] = (self._dual(i) if u is None else u).to(self.u)
            self.superclass_encoding[concept] = superclass_encoding.to(self.i)
            if gate is not None:
                self.gates[concept] = torch.tensor(astuple(gate)).to(self.gates)
            self.initialised[concept] = True
        self._following.pop(concept, None)
        self.forget()

    def set_gate(
        self,
        concept: int = 0,
        *,
        bias: float | None = None,
        temperature: float | None = None,
        strength: float | None = None,
    ) -> None:
        """Change a concept's gate at inference (beta, tau, strength); None keeps a value."""
        before = self.gates[concept].tolist()
        asked = (bias, temperature, strength)
        gate = Gate(*(old if new is None else new for old, new in zip(before, asked, strict=True)))
        with torch.no_grad():
            self.gates[concept] = torch.tensor(astuple(gate)).to(self.gates)
        self.forget()

    @torch.no_grad()
    def follow(self, concept: int, encoding: Tensor, superclass_encoding: Tensor | None) -> None:
        """Move ``i`` towards the concept's encoding (D,) of this step, and the superclass too.

        The first call starts both at ``superclass_encoding``. Called again in the same step (by
        another layer, or when gradient checkpointing runs a forward twice) it starts from where
        the step started, so a step counts once. A step ends with `end_step`, which
        `get_finetune_optimizer` sees to; without it, it ends when another encoding arrives.
        """
        encoding = encoding.detach().to(self.i)
        if superclass_encoding is not None:
            superclass_encoding = superclass_encoding.detach().to(self.i)
        for name, vector in (("concept", encoding), ("superclass", superclass_encoding)):
            if vector is not None and not bool(torch.isfinite(vector).all()):
                raise ValueError(f"expected finite {name} encodings, found NaN or infinity")
        if not bool(self.initialised[concept]):
            if superclass_encoding is None:
                raise ValueError(
                    f"concept {concept} starts at its superclass: expected "
                    "text_enc_with_superclass with the first training batch, found none"
                )
            if self.metric is None:
                logger.warning(
                    "no covariance C was given: similarities are plain scalar products; measure "
                    "one with calculate_input_covariance"
                )
            self.set(concept, superclass_encoding, superclass_encoding)
        before = self._following.get(concept)
        start = (self.i[concept].clone(), self.superclass_encoding[concept].clone())
        if before is not None:
            seen = torch.equal(encoding, before.newest.to(encoding))
            if seen and (superclass_encoding is None or before.newest_superclass is not None):
                return
            if seen or self.steps_with_optimizer:
                start = (before.i.to(encoding), before.superclass.to(encoding))
        self._following[concept] = _Following(*start, encoding, superclass_encoding)
        self.i[concept] = torch.lerp(encoding, start[0], self.input_decay)
        if superclass_encoding is not None:
            followed = torch.lerp(superclass_encoding, start[1], self.input_decay)
            self.superclass_encoding[concept] = followed
        self.u[concept] = self._dual(self.i[concept]).to(self.u)
        self.forget()

    def end_step(self) -> None:
        """Say that an optimiser step is over: the next encoding is the next step's."""
        self._following.clear()

    def gated(self, encodings: Tensor, ids: tuple[int, ...], training: bool) -> tuple[Tensor, ...]:
        """x' (..., N, D) and gates (..., N, k) of the concepts ``ids``, by `gated_inputs`.

        Without gradients the layers after the first get what the first had computed.
        """
        if torch.is_grad_enabled() or encodings.is_inference():
            # With gradients a kept result would take part in several graphs, and checkpointing
            # counts what each layer computes; inference tensors do not tell when they change.
            return gated_inputs(encodings, self._basis(ids, training))
        key = (encodings._version, ids, training)
        if self._latest is not None and self._latest[0]() is encodings and self._latest[1] == key:
            return self._latest[2]
        result = gated_inputs(encodings, self._basis(ids, training))
        # Kept as long as the encodings live, and no longer.
        self._latest = (weakref.ref(encodings, self._forget_latest()), key, result)
        return result

    @contextmanager
    def given(
        self,
        concept_indices: Tensor | None = None,
        text_enc_with_superclass: Tensor | None = None,
        concept_id: int | tuple[int, ...] | None = None,
    ) -> Iterator[None]:
        """Within this context, modules called with the encodings alone use these arguments.

        For networks whose attention calls ``to_k(text)`` and hands nothing else through.
        """
        former = self.prompts
        self.prompts = Prompts(concept_indices, text_enc_with_superclass, concept_id)
        try:
            yield
        finally:
            self.prompts = former
            self._recent = Prompts(concept_indices, None, concept_id)

    def prompts_for(self, encodings: Tensor) -> Prompts:
        """What `given` says, or said of these very encodings of the present step.

        Gradient checkpointing runs a layer's forward again when the context is long closed.
        """
        recent = self._recent
        places = recent.concept_indices
        if self.prompts.concept_indices is not None or places is None or not self.training:
            return self.prompts
        concept = recent.concept_id if isinstance(recent.concept_id, int) else 0
        step = self._following.get(concept)
        if step is None or encodings.ndim != 3 or len(places) != len(encodings):
            return self.prompts
        if int(places.max()) >= encodings.shape[1]:
            return self.prompts
        same = torch.equal(mean_at(encodings, places).to(self.i), step.newest.to(self.i))
        return recent if same else self.prompts

    def forget(self) -> None:
        """Drop what was computed from the buffers; call it after changing them by hand."""
        self._bases.clear()
        self._latest = None

    def _dual(self, i: Tensor) -> Tensor:
        return i.detach() if self.metric is None else self.metric.dual(i)

    def _basis(self, ids: tuple[int, ...], training: bool) -> Basis:
        if (ids, training) not in self._bases:
            directions = []
            for concept in ids:
                gate = self.train_gate if training else Gate(*self.gates[concept].tolist())
                directions.append(
                    Direction(
                        self.i[concept].clone(),
                        self.u[concept].clone(),
                        gate,
                        name=f"concept {concept}",
                    )
                )
            self._bases[ids, training] = combine(directions)
        return self._bases[ids, training]

    def _forget_latest(self) -> Callable[[object], None]:
        owner = weakref.ref(self)

        def forget(gone: object) -> None:
            inputs = owner()
            if inputs is not None and inputs._latest is not None and inputs._latest[0] is gone:
                inputs._latest = None

        return forget

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConceptInputs:
        # Casting a network to half precision must not round these: u and e cancel.
        kept = {name: getattr(self, name) for name in _FLOATS}
        super()._apply(fn, recurse)
        for name, former in kept.items():
            moved = getattr(self, name)
            if moved.dtype != former.dtype:
                setattr(self, name, former.to(moved.device))
        self.forget()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._following.clear()
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be copied; what it guards is quickly made again.
        return {**self.__dict__, "_bases": {}, "_latest": None}


def mean_at(encodings: Tensor, places: Tensor) -> Tensor:
    """Mean (D,) over prompts of the encodings (B, N, D) at each one's place (B,); no gradient."""
    rows = torch.arange(len(places), device=encodings.device)
    return encodings.detach()[rows, places.to(encodings.device)].float().mean(0)


def merge_inputs(*inputs: ConceptInputs) -> ConceptInputs:
    """One `ConceptInputs` with the concepts of several, in their order.

    Concepts keep their own ``u``, so they may have been trained with different covariances; the
    result can be trained further only where all share one. Raises ValueError for other widths.
    """
    widths = [one.width for one in inputs]
    if len(set(widths)) != 1:
        raise ValueError(f"expected inputs of one width D, found {widths}")
    first = inputs[0]
    merged = ConceptInputs(
        first.width,
        num_concepts=sum(one.num_concepts for one in inputs),
        input_decay=first.input_decay,
        train_beta=first.train_gate.bias,
        train_temperature=first.train_gate.temperature,
    )
    if all(one.metric is first.metric for one in inputs):
        merged.metric = first.metric
    for name in (*_FLOATS, "initialised"):
        rows = [getattr(one, name).to(first.i.device) for one in inputs]
        setattr(merged, name, torch.cat(rows).clone())
    return merged
