"""The gated rank-one edit of a text projection (Perfusion, eq. 3 and Appendix B).

For an encoding ``e`` of one token, a projection ``W`` and one concept with target input ``i``,
dual ``u = C^-1 i`` and target output ``o``::

    s = (u . e) / (i . u)          g = sigmoid((s - bias) / temperature)
    h = W (e - s i) + g o

Several concepts share one subtraction, solved through their Gram matrix ``G_ba = u_b . i_a``.
``s``, ``g`` and ``e - s i`` depend on neither layer nor step: `gated_inputs` computes them once
per encoding and every projection then only does `project`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .gate import Gate

Part = Literal["k", "v"]

# Relative ridge on the Gram matrix. It only guards the solve: concepts close enough to parallel
# for it to matter are refused below.
GRAM_RIDGE = 1e-12
# Smallest eigenvalue of the unit-diagonal Gram matrix; for two concepts it is 1 - cosine.
PARALLEL_LIMIT = 1e-3


@dataclass(frozen=True, eq=False)
class Direction:
    """What one concept asks of the text encoding, the same for every layer.

    ``i`` and ``u`` have shape (D,). ``name`` appears in messages only. Raises ValueError for
    shapes that differ.
    """

    i: Tensor
    u: Tensor
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

    ``inputs`` and ``duals`` (k, D) hold the ``i_a`` and ``u_a / energy_a``; ``mix`` (k, k) turns
    similarities into subtraction coefficients, ``a_n = s_n mix``; ``bias``, ``temperature`` and
    ``strength`` have shape (k,).
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

    ``inputs`` x' (B, N, D) and ``gates`` (B, N, k) are computed once; ``keys`` and ``values`` map
    the name of an attention layer to its outputs (k, d), one row per concept.
    """

    inputs: Tensor
    gates: Tensor
    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]

    def apply(self, linear: Callable[[Tensor], Tensor], layer: str, part: Part) -> Tensor:
        """The edited projection (B, N, d); ``linear`` is the layer's own, unedited forward."""
        outputs = self.keys[layer] if part == "k" else self.values[layer]
        return project(linear, self.inputs, self.gates, outputs)


def active_directions(directions: Sequence[Direction]) -> list[Direction]:
    """The directions whose strength is not 0. None left: there is no edit to make."""
    return [direction for direction in directions if direction.gate.strength != 0]


def combine(directions: Sequence[Direction]) -> Basis:
    """Combine the directions of the active concepts (Perfusion, Appendix B).

    A direction of strength 0 keeps its column but takes no part in the Gram matrix. The solve is
    done in fp64 on the CPU. Raises ValueError for no directions, differing widths, an energy that
    is not positive, and (nearly) parallel concepts, which are named.
    """
    if not directions:
        raise ValueError("expected at least one concept, found none")
    widths = {direction.i.shape[0] for direction in directions}
    if len(widths) > 1:
        found = ", ".join(f"'{d.name}' has {d.i.shape[0]}" for d in directions)
        raise ValueError(
            f"expected concepts of one encoding width, found: {found}; "
            "use only concepts trained for the same model family together"
        )
    energies = [float(direction.energy) for direction in directions]
    for direction, energy in zip(directions, energies, strict=True):
        if not 0 < energy < float("inf"):
            raise ValueError(
                f"concept '{direction.name}': expected a positive finite energy i.u, found "
                f"{energy}; its i and u do not belong together, train or load it again"
            )
    inputs = torch.stack([_exact(d.i) for d in directions])
    duals = torch.stack([_exact(d.u) / e for d, e in zip(directions, energies, strict=True)])
    gates = [d.gate for d in directions]
    return Basis(
        inputs=inputs,
        duals=duals,
        mix=_mix(inputs, duals, directions),
        bias=torch.tensor([gate.bias for gate in gates], dtype=torch.float64),
        temperature=torch.tensor([gate.temperature for gate in gates], dtype=torch.float64),
        strength=torch.tensor([gate.strength for gate in gates], dtype=torch.float64),
    )


def similarities(encodings: Tensor, directions: Sequence[Direction] | Basis) -> Tensor:
    """``s_n,c`` (..., N, k), 1 where an encoding (..., N, D) is the concept's own ``i``."""
    wide, basis = _prepare(encodings, directions)
    return wide @ basis.duals.mT


def gated_inputs(
    encodings: Tensor, directions: Sequence[Direction] | Basis
) -> tuple[Tensor, Tensor]:
    """The edited input x' and the gates of every token (method section 1).

    ``encodings`` (..., N, D) -> x' (..., N, D) in the encodings' dtype, and gates (..., N, k)
    in fp32 (fp64 for fp64 encodings), already multiplied by the strengths. A `Basis` made once
    by `combine` saves repeating the solve. Concepts of strength 0 change nothing and get gate 0.
    Raises ValueError as `combine` does, and for encodings of another width.
    """
    inputs, similarity, basis = edited_inputs(encodings, directions)
    return inputs, open_gates(similarity, basis)


def edited_inputs(
    encodings: Tensor, directions: Sequence[Direction] | Basis
) -> tuple[Tensor, Tensor, Basis]:
    """x' (..., N, D) in the encodings' dtype, the similarities (..., N, k), the basis used.

    The part of `gated_inputs` that does not change when the gates move.
    """
    wide, basis = _prepare(encodings, directions)
    similarity = wide @ basis.duals.mT
    coefficients = (similarity @ basis.mix) * basis.strength
    return (wide - coefficients @ basis.inputs).to(encodings.dtype), similarity, basis


def open_gates(similarity: Tensor, basis: Basis) -> Tensor:
    """``g w`` (..., N, k) of similarities (..., N, k): the gates times the strengths."""
    return torch.sigmoid((similarity - basis.bias) / basis.temperature) * basis.strength


def project(
    linear: Callable[[Tensor], Tensor], inputs: Tensor, gates: Tensor, outputs: Tensor
) -> Tensor:
    """``W x' + sum_c g_c o_c``: the layer's own forward and one rank-k update.

    x' (..., N, D), gates (..., N, k), outputs (k, d) -> (..., N, d), summed in the layer's dtype.
    """
    hidden = linear(inputs)
    return hidden + gates.to(hidden.dtype) @ outputs.to(hidden)


def edit_projection(
    weight: Tensor, encodings: Tensor, directions: Sequence[Direction], outputs: Tensor
) -> Tensor:
    """Eq. 3 as a pure function: weight (d, D), encodings (..., N, D), outputs (k, d).

    Returns (..., N, d). With every strength 0 it is exactly ``encodings @ weight.T``.
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


def _mix(inputs: Tensor, duals: Tensor, directions: Sequence[Direction]) -> Tensor:
    """``(G^-1)^T`` for the unit-diagonal Gram matrix of the active concepts, 0 elsewhere."""
    rows = [row for row, direction in enumerate(directions) if direction.gate.strength != 0]
    mix = torch.zeros(len(directions), len(directions), dtype=torch.float64)
    if not rows:
        return mix
    gram = duals[rows] @ inputs[rows].mT  # G_ba / energy_b, so that the diagonal is 1
    _refuse_parallel(gram, [directions[row] for row in rows])
    identity = torch.eye(len(rows), dtype=torch.float64)
    inverse = torch.linalg.solve(gram + GRAM_RIDGE * identity, identity)
    selected = torch.tensor(rows)
    mix[selected[:, None], selected] = inverse.mT
    return mix


def _refuse_parallel(gram: Tensor, directions: Sequence[Direction]) -> None:
    # Eigenvalues do not change when a concept's i and u are rescaled, unlike singular values.
    values, vectors = torch.linalg.eig(gram.detach())
    least = int(values.abs().argmin())
    if float(values[least].abs()) >= PARALLEL_LIMIT:
        return
    lengths = torch.stack([_exact(direction.i.detach()).norm() for direction in directions])
    weights = vectors[:, least].abs() * lengths
    named = [
        f"'{direction.name}'"
        for direction, weight in zip(directions, weights / weights.max(), strict=True)
        if weight > 0.1
    ]
    raise ValueError(
        f"the concepts {' and '.join(named)} are (nearly) parallel: expected text encodings the "
        f"model can tell apart, found a Gram eigenvalue of {float(values[least].abs()):.2g} "
        f"(at least {PARALLEL_LIMIT:g} is needed); leave one out, or train one of them again "
        "from another superclass"
    )
