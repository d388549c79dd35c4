"""The gated rank-one edit of a text projection (Perfusion, eq. 3 and Appendix B).

For an encoding ``e`` of one token, a projection ``W`` and one concept with target input ``i``,
dual ``u = C^-1 i`` and target output ``o``::

    s = (u . e) / (i . u)          g = sigmoid((s - bias) / temperature)
    h = W (e - s i) + g o

Several concepts share one subtraction, solved through their Gram matrix ``G_ba = u_b . i_a``;
where their strengths differ, by the rule of `strengths`. ``s``, ``g`` and ``e - s i`` depend on
neither layer nor step: `gated_inputs` computes them once per encoding and every projection then
only does `project`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..shapes import Encodings, Gates, Outputs, Vector, Weight
from .gate import Gate
from .strengths import levels

Part = Literal["k", "v"]

# Relative ridge on the Gram matrix. It only guards the solve: concepts close enough to parallel
# for it to matter are refused below.
GRAM_RIDGE = 1e-12
# Smallest eigenvalue of the unit-diagonal Gram matrix; for two concepts it is 1 - cosine.
PARALLEL_LIMIT = 1e-3
# Concepts that take part in a dependence less than this, relative to the most, are not named.
_LEAST_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class Direction:
    """What one concept asks of the text encoding, the same for every layer.

    Attributes:
        i: its target input.
        u: the dual of i.
        gate: when the gate opens, and the strength.
        name: what messages call it.

    Raises:
        ValueError: for i and u of different shapes.
    """

    i: Vector
    u: Vector
    gate: Gate
    name: str = "concept"

    def __post_init__(self) -> None:
        if self.i.ndim != 1 or self.i.shape != self.u.shape:
            raise ValueError(
                f"concept '{self.name}': expected i and u of one shape (D,), "
                f"found i {tuple(self.i.shape)} and u {tuple(self.u.shape)}"
            )

    @property
    def energy(self) -> Tensor:
        """``i . u`` as a 0-d fp64 tensor on the CPU."""
        return _exact(self.i) @ _exact(self.u)


@dataclass(frozen=True, eq=False)
class Basis:
    """Several directions combined, ready for the encodings of one device.

    Attributes:
        inputs: the ``i_a`` (k, D).
        duals: the ``u_a / energy_a`` (k, D).
        mix: (k, k), turns similarities into subtraction coefficients, ``a_n = s_n mix``; the
            strengths are in it.
        bias: (k,) of the gates.
        temperature: (k,) of the gates.
        strength: (k,), what the open gates are multiplied by.
    """

    inputs: Tensor
    duals: Tensor
    mix: Tensor
    bias: Tensor
    temperature: Tensor
    strength: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Basis:
        """The same basis on ``device`` in ``dtype`` (itself when it is there already)."""
        if self.inputs.device == device and self.inputs.dtype == dtype:
            return self
        # The dtype first: some devices have no fp64.
        return Basis(*(getattr(self, name).to(dtype).to(device) for name in _BASIS_FIELDS))

    def with_gates(self, bias: Sequence[float], temperature: Sequence[float]) -> Basis:
        """The same basis with other gates, one value for each direction."""
        return replace(
            self,
            bias=self.bias.new_tensor(list(bias)),
            temperature=self.temperature.new_tensor(list(temperature)),
        )


_BASIS_FIELDS = ("inputs", "duals", "mix", "bias", "temperature", "strength")


@dataclass(frozen=True, eq=False)
class GatedProjections:
    """Everything the projections of one model need to apply the edit to one batch.

    Attributes:
        inputs: x', computed once.
        gates: how far each concept's gate is open at each token, computed once.
        keys: name of an attention layer -> its outputs, one row per concept.
        values: the same for the values.
    """

    inputs: Encodings
    gates: Gates
    keys: Mapping[str, Outputs]
    values: Mapping[str, Outputs]

    def apply(self, linear: Callable[[Tensor], Tensor], layer: str, part: Part) -> Tensor:
        """The edited projection (B, N, d); ``linear`` is the layer's own, unedited forward."""
        outputs = self.keys[layer] if part == "k" else self.values[layer]
        return project(linear, self.inputs, self.gates, outputs)


def active_directions(directions: Sequence[Direction]) -> list[Direction]:
    """The directions whose strength is not 0. None left: there is no edit to make."""
    return [direction for direction in directions if direction.gate.strength != 0]


def combine(directions: Sequence[Direction]) -> Basis:
    """Combine the directions of several concepts (Perfusion, Appendix B), in fp64 on the CPU.

    A direction of strength 0 keeps its column but takes no part in the subtraction.

    Raises:
        ValueError: for no directions, differing widths, an energy that is not positive, and
            (nearly) parallel concepts; the concepts concerned are named.
    """
    if not directions:
        raise ValueError("expected at least one concept, found none")
    if len({direction.i.shape[0] for direction in directions}) > 1:
        found = ", ".join(f"'{d.name}' has {d.i.shape[0]}" for d in directions)
        raise ValueError(
            f"expected concepts of one encoding width, found: {found}; "
            "use only concepts trained for the same model family together"
        )
    inputs = torch.stack([_exact(direction.i) for direction in directions])
    duals = torch.stack([_exact(direction.u) for direction in directions])
    energies = (inputs * duals).sum(-1)
    for direction, energy in zip(directions, energies.tolist(), strict=True):
        if not 0 < energy < float("inf"):
            raise ValueError(
                f"concept '{direction.name}': expected a positive finite energy i.u, found "
                f"{energy}; its i and u do not belong together, train or load it again"
            )
    duals = duals / energies[:, None]
    gates = [(d.gate.bias, d.gate.temperature, d.gate.strength) for d in directions]
    bias, temperature, strength = torch.tensor(gates, dtype=torch.float64).mT.contiguous()
    mix = _mix(duals @ inputs.mT, directions)
    return Basis(inputs, duals, mix, bias, temperature, strength)


def similarities(encodings: Encodings, directions: Sequence[Direction] | Basis) -> Gates:
    """``s_n,c`` (..., N, k), 1 where an encoding (..., N, D) is the concept's own ``i``."""
    with without_autocast(encodings.device):
        wide, basis = _prepare(encodings, directions)
        return wide @ basis.duals.mT


def gated_inputs(
    encodings: Encodings, directions: Sequence[Direction] | Basis
) -> tuple[Encodings, Gates]:
    """The edited input x' and the gates of every token (method section 1).

    Concepts of strength 0 change nothing and get gate 0.

    Args:
        encodings: (..., N, D).
        directions: the concepts, or the `Basis` that `combine` made of them once.

    Returns:
        x' (..., N, D) in the encodings' dtype, and the gates (..., N, k) in fp32 (fp64 for fp64
        encodings), already multiplied by the strengths.

    Raises:
        ValueError: as `combine` does, and for encodings of another width.
    """
    inputs, similarity, basis = edited_inputs(encodings, directions)
    return inputs, open_gates(similarity, basis)


def edited_inputs(
    encodings: Encodings, directions: Sequence[Direction] | Basis
) -> tuple[Encodings, Gates, Basis]:
    """The part of `gated_inputs` that does not change when the gates move.

    Returns:
        x' (..., N, D) in the encodings' dtype, the similarities (..., N, k), the basis used.
    """
    # Autocast would compute in half precision what is in fp32 here on purpose.
    with without_autocast(encodings.device):
        wide, basis = _prepare(encodings, directions)
        similarity = wide @ basis.duals.mT
        removed = (similarity @ basis.mix) @ basis.inputs
        return (wide - removed).to(encodings.dtype), similarity, basis


def open_gates(similarity: Gates, basis: Basis) -> Gates:
    """``g w`` (..., N, k) of similarities (..., N, k): the gates times the strengths."""
    return torch.sigmoid((similarity - basis.bias) / basis.temperature) * basis.strength


def project(
    linear: Callable[[Tensor], Tensor], inputs: Encodings, gates: Gates, outputs: Outputs
) -> Tensor:
    """``W x' + sum_c g_c o_c``: the layer's own forward and one rank-k update.

    x' (..., N, D), gates (..., N, k), outputs (k, d) -> (..., N, d), summed in the layer's dtype.
    """
    hidden = linear(inputs)
    return hidden + gates.to(hidden.dtype) @ outputs.to(hidden)


def edit_projection(
    weight: Weight, encodings: Encodings, directions: Sequence[Direction], outputs: Outputs
) -> Tensor:
    """Eq. 3 as a pure function: encodings (..., N, D) -> (..., N, d).

    With every strength 0 it is exactly ``encodings @ weight.T``.

    Raises:
        ValueError: as `gated_inputs` does, and for outputs that do not fit.
    """
    if outputs.shape != (len(directions), weight.shape[0]):
        raise ValueError(
            f"expected outputs of shape {(len(directions), weight.shape[0])} "
            f"(concepts, features), found {tuple(outputs.shape)}"
        )
    rows = [row for row, direction in enumerate(directions) if direction.gate.strength != 0]
    if not rows:
        return torch.nn.functional.linear(encodings, weight)
    inputs, gates = gated_inputs(encodings, active_directions(directions))
    return project(lambda x: torch.nn.functional.linear(x, weight), inputs, gates, outputs[rows])


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which sums keep the dtype of their tensors, inside of autocast too."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float64)


def _prepare(encodings: Tensor, directions: Sequence[Direction] | Basis) -> tuple[Tensor, Basis]:
    basis = directions if isinstance(directions, Basis) else combine(directions)
    if encodings.shape[-1] != basis.inputs.shape[-1]:
        raise ValueError(
            f"expected encodings of width {basis.inputs.shape[-1]}, the concept's, found "
            f"{encodings.shape[-1]}; use the model family the concept was trained for"
        )
    # Half precision would lose the similarity: u and e cancel in their scalar product.
    dtype = torch.promote_types(encodings.dtype, torch.float32)
    return encodings.to(dtype), basis.to(encodings.device, dtype)


def _mix(gram: Tensor, directions: Sequence[Direction]) -> Tensor:
    """The subtraction of every level, ``(G^-1)^T`` of its concepts, summed (`strengths`).

    ``gram`` (k, k) is ``G_ba / energy_b``, so that its diagonal is 1.
    """
    mix = torch.zeros_like(gram)
    for part, rows in levels([direction.gate.strength for direction in directions]):
        chosen = torch.tensor(rows)
        among = gram[chosen[:, None], chosen]
        _refuse_parallel(among, [directions[row].name for row in rows])
        identity = torch.eye(len(rows), dtype=gram.dtype)
        inverse = torch.linalg.solve(among + GRAM_RIDGE * identity, identity)
        mix[chosen[:, None], chosen] += part * inverse.mT
    return mix


def _refuse_parallel(gram: Tensor, names: Sequence[str]) -> None:
    if len(names) == 1:
        return
    # Eigenvalues do not change when a concept's i and u are rescaled, unlike singular values.
    values, vectors = torch.linalg.eig(gram.detach())
    small = values.abs() < PARALLEL_LIMIT
    if not bool(small.any()):
        return
    # The projector onto all that is dependent: its diagonal says how much each concept takes part,
    # whatever their lengths and whichever of several eigenvectors were found.
    projector = vectors[:, small] @ torch.linalg.pinv(vectors)[small]
    shares = projector.diagonal().abs()
    count = max(2, int((shares > _LEAST_SHARE * shares.max()).sum()))
    involved = sorted(shares.argsort(descending=True, stable=True)[:count].tolist())
    named = " and ".join(f"'{names[row]}'" for row in involved)
    raise ValueError(
        f"the concepts {named} are (nearly) parallel: expected text encodings the "
        f"model can tell apart, found a Gram eigenvalue of {float(values.abs().min()):.2g} "
        f"(at least {PARALLEL_LIMIT:g} is needed); leave one out, or train one of them again "
        "from another superclass, with twin lock under another placeholder"
    )
