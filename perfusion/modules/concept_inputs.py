"""What the edit modules of one network share: the concepts, followed in training, served to layers.

The method keeps one ``i`` per concept, not one per layer (method section 3). `ConceptInputs` is
that one place. How ``i`` moves is in `following`; here is when it does, and what layers ask for.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..gated.covariance import Covariance
from ..gated.gate import Gate
from ..gated.rank_one import Basis, Direction, combine, gated_inputs
from ..shapes import Encodings, Gates, Vector
from .concept_vectors import VECTORS, ConceptVectors
from .following import Averages, ShownPrompts, Step, check_places, mean_at
from .kept import Kept

logger = logging.getLogger("perfusion")

# From this cosine on u and i are one direction: the dual of the plain scalar product, rounded.
_PLAIN_DUAL = 0.999


@dataclass(frozen=True, eq=False)
class Prompts:
    """Where the concept stands in the prompts now going through a network.

    Attributes:
        concept_indices: (B,), the token that is the concept in each prompt.
        text_enc_with_superclass: the prompts with the superclass word in that place.
        concept_id: which concept it is, or which several at inference.
    """

    concept_indices: Tensor | None = None
    text_enc_with_superclass: Encodings | None = None
    concept_id: int | tuple[int, ...] | None = None


class ConceptInputs(ConceptVectors):
    """The inputs of several concepts over text encodings of one width D.

    Args:
        width: D.
        C: the second moment of the encodings: a `Covariance`, a matrix (D, D), or None for the
            plain scalar product (worse: rare directions of the text then open the gate as easily
            as common ones).
        num_concepts: k.
        input_decay: the decay of the average that ``i`` is, per training step.
        train_beta: the gate's bias in training.
        train_temperature: the gate's temperature in training.
        eval_beta: the gate's bias at inference.
        eval_temperature: the gate's temperature at inference.

    Attributes: those of `ConceptVectors`.

    Raises:
        ValueError: for settings the formulas cannot take.
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
        super().__init__(width, num_concepts, C, Gate(eval_beta, eval_temperature))
        if not 0 <= input_decay <= 1:
            raise ValueError(f"input_decay: expected 0 to 1, found {input_decay}")
        self.input_decay = input_decay
        self.train_gate = Gate(train_beta, train_temperature)
        # Set where an optimiser says when a step is over; else another encoding says so.
        self.steps_with_optimizer = False
        self.prompts = Prompts()
        self._steps: dict[int, Step] = {}
        self._bases: defaultdict[Any, Kept[Basis]] = defaultdict(Kept)
        self._gated: Kept[tuple[Tensor, Tensor]] = Kept()

    def set(
        self,
        concept: int,
        i: Vector,
        superclass_encoding: Vector,
        u: Vector | None = None,
        gate: Gate | None = None,
    ) -> None:
        """Put a concept in place; arguments and errors as in `ConceptVectors.set`."""
        super().set(concept, i, superclass_encoding, u, gate)
        self._steps.pop(concept, None)

    @torch.no_grad()
    def follow(
        self, concept: int, encodings: Encodings, places: Tensor, superclass: Encodings | None
    ) -> None:
        """Move ``i`` towards the concept's encoding in a training batch, the superclass's too.

        The first batch of all starts both at the superclass. A step counts once, however often
        layers show its batches (`following`). It ends with `end_step`, which
        `get_finetune_optimizer` sees to; without it, it ends when another encoding arrives.

        Args:
            concept: its number.
            encodings: of prompts with the concept.
            places: (B,), the concept's position in each.
            superclass: encodings of the same prompts with the superclass word in that place.

        Raises:
            ValueError: for encodings that are not finite, a first batch without the superclass,
                and a concept whose dual was made with a covariance that is not at hand.
        """
        step = self._steps.get(concept)
        if step is not None and step.shows_again(encodings, places, superclass):
            return
        batch = None if step is None else step.find(encodings, places)
        if step is None or batch is None:
            step, batch = self._begin(concept, step, encodings, places, superclass)
        elif batch.superclass is None and superclass is not None:
            batch.superclass = self._seen("superclass", superclass, places)
        step.shows(batch, encodings, places)
        moved = step.start.towards(batch.encoding, batch.superclass, self.input_decay)
        self._put(concept, moved)

    def end_step(self) -> None:
        """Say that an optimiser step is over: the next encoding is the next step's."""
        for concept, step in self._steps.items():
            if len(step.batches) > 1:
                self._put(concept, step.ended(self.input_decay))
        self._steps.clear()

    def gated(
        self, encodings: Encodings, ids: tuple[int, ...], training: bool
    ) -> tuple[Encodings, Gates]:
        """x' and gates of the concepts ``ids``, by `gated_inputs`.

        Without gradients the layers after the first get what the first had computed.
        """

        def compute() -> tuple[Tensor, Tensor]:
            return gated_inputs(encodings, self._basis(ids, training, encodings))

        if torch.is_grad_enabled():
            # A kept result would take part in several graphs, and checkpointing counts what each
            # layer computes.
            return compute()
        sources = (encodings, self.i, self.u, self.gates)
        return self._gated.get(sources, compute, (ids, training, self.writes))

    @contextmanager
    def given(
        self,
        concept_indices: Tensor | None = None,
        text_enc_with_superclass: Encodings | None = None,
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

    def prompts_for(self, encodings: Encodings) -> Prompts:
        """What `given` says, or what the present step knows of these very encodings.

        Gradient checkpointing runs a layer's forward again when the context is long closed.
        """
        if self.training and self.prompts.concept_indices is None:
            for concept, step in self._steps.items():
                batch = step.find(encodings)
                if batch is not None:
                    return Prompts(batch.places, None, concept)
        return self.prompts

    def _begin(
        self,
        concept: int,
        step: Step | None,
        encodings: Encodings,
        places: Tensor,
        superclass: Encodings | None,
    ) -> tuple[Step, ShownPrompts]:
        """A batch not seen before: in the present step, or the first one of the next."""
        check_places(encodings, places)
        if superclass is not None and superclass.shape != encodings.shape:
            raise ValueError(
                f"expected text_enc_with_superclass of shape {tuple(encodings.shape)} like "
                f"text_enc, found {tuple(superclass.shape)}"
            )
        encoding = self._seen("concept", encodings, places)
        shown = None if superclass is None else self._seen("superclass", superclass, places)
        batch = ShownPrompts(places, encoding, shown)
        if not self.started(concept):
            if shown is None:
                raise ValueError(
                    f"concept {concept} starts at its superclass: expected "
                    "text_enc_with_superclass with the first training batch, found none"
                )
            if self.metrics[concept] is None:
                logger.warning(
                    "no covariance C was given: similarities are plain scalar products; measure "
                    "one with calculate_input_covariance"
                )
            self.set(concept, shown, shown)
        if step is None or not self.steps_with_optimizer:
            self._require_metric(concept)
            start = Averages(self.i[concept].clone(), self.superclass_encoding[concept].clone())
            step = self._steps[concept] = Step(start)
        step.batches.append(batch)
        return step, batch

    def _seen(self, kind: str, encodings: Encodings, places: Tensor) -> Vector:
        found = mean_at(encodings, places).to(self.i)
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"expected finite {kind} encodings, found NaN or infinity")
        return found

    def _require_metric(self, concept: int) -> None:
        if self.metrics[concept] is not None:
            return
        plain = torch.cosine_similarity(self.i[concept], self.u[concept], dim=0)
        if float(plain) < _PLAIN_DUAL:
            raise ValueError(
                f"concept {concept} was trained with a covariance: expected the same C to train it "
                "further, found none; pass C= when wrapping the network"
            )

    def _basis(self, ids: tuple[int, ...], training: bool, like: Tensor) -> Basis:
        dtype = torch.promote_types(like.dtype, torch.float32)

        def compute() -> Basis:
            gates = [
                self.train_gate if training else Gate(*values) for values in self.gates.tolist()
            ]
            directions = [
                Direction(self.i[one], self.u[one], gates[one], name=f"concept {one}")
                for one in ids
            ]
            return combine(directions).to(like.device, dtype)

        kept = self._bases[ids, training, like.device, dtype]
        return kept.get((self.i, self.u, self.gates), compute, self.writes)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._steps.clear()


def merge_inputs(*inputs: ConceptInputs) -> ConceptInputs:
    """One `ConceptInputs` with the concepts of several, in their order.

    Concepts keep their own ``u`` and the covariance it is made with. The first one's decay and
    training gate hold for all.

    Raises:
        ValueError: for inputs of different widths.
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
    merged.metrics = tuple(metric for one in inputs for metric in one.metrics)
    for name in (*VECTORS, "gates", "initialised"):
        rows = [getattr(one, name).to(first.i.device) for one in inputs]
        setattr(merged, name, torch.cat(rows).clone())
    return merged
