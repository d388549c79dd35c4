"""Twin lock: the prompt reads as its superclass, and a concept speaks in values only.

The *twin* ``t`` of a prompt has the superclass words where the prompt ``e`` has placeholders. The
model is conditioned on ``t``; from ``e`` come the similarities alone, and with them the gates.
A concept is recognised by what its word changes, ``d = i - i_superclass``: i and the superclass's
encoding are nearly parallel, and what the place in a sentence does to both is not in ``e - t``.
Of several concepts, s says how much of each change is in ``e - t`` (least squares): where the d
are not at right angles, one concept's word would open the gates of the others, too::

    s_c = (e - t) . d_c / |d_c|^2                 for one concept
    s   = argmin_s |e - t - sum_c s_c d_c|        for several (of different strengths: `strengths`)
    g_c = sigmoid((s_c - bias_c) / temperature_c), and 0 at every token where e equals t
    a_c = w_c g_c / max(1, sum_b min(w_b, 1) g_b)
    K:  h = W_K t                   V:  h = W_V (1 - sum_c a_c) t + sum_c a_c o_c

in training and at inference alike. The division keeps several gates that are open at one token
from adding up to more than one; it is continuous in every strength, and a concept of strength 0
is a concept left out. For one concept it is ``h' = (1 - w) W t + w h``, as everywhere.

What follows: at a token where ``e`` equals ``t`` the input of V is ``1 t`` and what is added is 0,
so a prompt without a placeholder gives bit for bit what it gives without concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn, sigmoid

from ..shapes import Vector
from .gate import Gate
from .rank_one import Basis, Direction, Part, combine, similarities


@dataclass(frozen=True, eq=False)
class TwinProjections:
    """Everything the projections of one model need to apply twin-locked concepts to one batch.

    Attributes:
        twin: t (B, N, D), which the keys are made of.
        inputs: ``(1 - sum a) t`` (B, N, D), which the values are made of.
        gates: a (B, N, k).
        values: the name of an attention layer -> its outputs o (k, d), one row per concept.
    """

    twin: Tensor
    inputs: Tensor
    gates: Tensor
    values: Mapping[str, Tensor]

    def apply(self, linear: Callable[[Tensor], Tensor], layer: str, part: Part) -> Tensor:
        """The projection (B, N, d) of a layer; ``linear`` is the layer's own, unedited forward."""
        if part == "k":
            return linear(self.twin)
        return self._with_values(linear(self.inputs), layer)

    def apply_behind(
        self, linear: Callable[[Tensor], Tensor], layer: str, part: Part, read: Tensor
    ) -> Tensor:
        """The same where the model changes t, token by token, before its layers read it.

        Args:
            linear: the layer's own, unedited forward.
            layer: its name.
            part: keys or values.
            read: what the layer reads for t (B, N, D').
        """
        if part == "k":
            return linear(read)
        gates = as_tokens_of(read, self.gates)
        return self._with_values(linear(twin_inputs(read, gates)), layer)

    def _with_values(self, hidden: Tensor, layer: str) -> Tensor:
        gates = as_tokens_of(hidden, self.gates).to(hidden.dtype)
        return hidden + gates @ self.values[layer].to(hidden)


def twin_direction(
    i: Vector,
    superclass_encoding: Vector,
    gate: Gate,
    name: str = "concept",
    parts: Sequence[int] = (),
) -> Direction:
    """What a concept's word changes, d, as the direction that `twin_gates` compares ``e - t`` with.

    Args:
        i: the encoding of the concept's word (D,).
        superclass_encoding: that of the superclass in its place (D,).
        gate: when the gate opens, and the strength.
        name: what messages call the concept.
        parts: widths of the encodings of several text encoders, as a `Covariance` has them; each
            part gets the same energy, so that the word is known in each.
    """
    change = i - superclass_encoding
    shares = change.split(list(parts) or [change.shape[0]])
    dual = torch.cat([share / share.square().sum() for share in shares])
    return Direction(change, dual, gate, name)


def combine_twins(directions: Sequence[Direction]) -> Basis:
    """The directions of `twin_direction` combined, in fp64 on the CPU, as `twin_gates` needs them.

    Their duals are those of all of them together: at the change that one concept's word makes, the
    similarity of every other concept is 0. Of different strengths, by the rule of `strengths`.

    Raises:
        ValueError: as `combine` does.
    """
    basis = combine(directions)
    if len(directions) == 1:
        return basis
    # What a strength of 0 leaves out has no column in the mix, and its gate is multiplied by 0.
    strength = torch.where(basis.strength == 0, 1, basis.strength)
    return replace(basis, duals=(basis.mix / strength).mT @ basis.duals)


def twin_gates(encodings: Tensor, twin: Tensor, directions: Sequence[Direction] | Basis) -> Tensor:
    """The gates a (..., N, k) of every token, already multiplied by the strengths.

    Args:
        encodings: e (..., N, D), of the prompts with placeholders.
        twin: t (..., N, D), of the prompts with superclass words.
        directions: those of `twin_direction`, or what `combine_twins` made of them.

    Returns:
        a in fp32 (fp64 for fp64 encodings).

    Raises:
        ValueError: as `combine` does, and for encodings that are not of one shape.
    """
    if encodings.shape != twin.shape:
        raise ValueError(
            f"expected a prompt and its twin of one shape, found {tuple(encodings.shape)} and "
            f"{tuple(twin.shape)}; encode both with as many tokens"
        )
    basis = directions if isinstance(directions, Basis) else combine_twins(directions)
    similarity = twin_similarities(encodings, twin, basis)
    return open_twin_gates(similarity, named_tokens(encodings, twin), basis)


def twin_similarities(encodings: Tensor, twin: Tensor, basis: Basis) -> Tensor:
    """s (..., N, k) of every token in fp32 (fp64 for fp64 encodings): 1 where e - t is d."""
    dtype = torch.promote_types(encodings.dtype, torch.float32)
    return similarities(encodings.to(dtype) - twin.to(dtype), basis)


def as_tokens_of(read: Tensor, gates: Tensor) -> Tensor:
    """Gates (B, N, k) for the same tokens in one row, where a model reads (1, B N, D) of them."""
    if read.shape[0] == 1 and read.shape[1] == gates.shape[0] * gates.shape[1]:
        return gates.flatten(0, 1)[None]
    return gates


def named_tokens(encodings: Tensor, twin: Tensor) -> Tensor:
    """(..., N) bool: the tokens at which a concept may speak, those where e and t differ."""
    return (encodings != twin).any(dim=-1)


def open_twin_gates(similarity: Tensor, named: Tensor, basis: Basis) -> Tensor:
    """a (..., N, k) of similarities (..., N, k) at the named tokens (..., N), 0 at the others.

    The part of `twin_gates` that is done again when the gates move.
    """
    basis = basis.to(similarity.device, similarity.dtype)
    gates = sigmoid((similarity - basis.bias) / basis.temperature) * named[..., None]
    total = (gates * basis.strength.clamp(max=1)).sum(dim=-1, keepdim=True)
    return gates * basis.strength / total.clamp(min=1)


def twin_inputs(twin: Tensor, gates: Tensor) -> Tensor:
    """``(1 - sum_c a_c) t`` (..., N, D), the input of V, in the dtype of the twin."""
    rest = 1 - gates.sum(dim=-1, keepdim=True)
    return rest.to(twin.dtype) * twin


def twin_projection(
    weight: Tensor,
    encodings: Tensor,
    twin: Tensor,
    directions: Sequence[Direction],
    outputs: Tensor,
) -> Tensor:
    """The edited values (..., N, d) as a pure function: weight (d, D), outputs (k, d)."""
    if outputs.shape != (len(directions), weight.shape[0]):
        raise ValueError(
            f"expected outputs of shape {(len(directions), weight.shape[0])} "
            f"(concepts, features), found {tuple(outputs.shape)}"
        )
    rows = [row for row, direction in enumerate(directions) if direction.gate.strength != 0]
    if not rows:
        return nn.functional.linear(twin, weight)
    gates = twin_gates(encodings, twin, [directions[row] for row in rows])
    hidden = nn.functional.linear(twin_inputs(twin, gates), weight)
    return hidden + gates.to(hidden.dtype) @ outputs[rows].to(hidden)
