"""Keys locked to the superclass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from perfusion.gated.gate import Gate
from perfusion.gated.key_lock import locked_outputs
from perfusion.gated.rank_one import Direction, edit_projection


def test_every_layers_key_is_its_own_projection_of_the_superclass():
    layers = {"a": nn.Linear(8, 4, bias=False), "b": nn.Linear(8, 6, bias=False)}
    encoding = torch.randn(8)

    def project(name: str, encodings: Tensor) -> Tensor:
        assert encodings.shape == (1, 1, 8)
        return layers[name](encodings)

    found = locked_outputs(project, layers, encoding)
    assert list(found) == ["a", "b"]
    for name, output in found.items():
        torch.testing.assert_close(output, layers[name].weight.detach() @ encoding)
        assert not output.requires_grad


def test_with_an_open_gate_the_concepts_token_attends_like_the_superclass():
    linear = nn.Linear(8, 4, bias=False)
    encoding, i = torch.randn(8), torch.randn(8)
    keys = locked_outputs(lambda _, e: linear(e), ["a"], encoding)
    direction = Direction(i, i, Gate(-1e6, 0.1))
    found = edit_projection(linear.weight, i[None], [direction], keys["a"][None])
    torch.testing.assert_close(found[0], linear(encoding))


def test_nothing_to_lock_is_an_error():
    with pytest.raises(ValueError, match="at least one cross-attention layer"):
        locked_outputs(lambda _, e: e, [], torch.ones(3))
    with pytest.raises(ValueError, match=r"\(D,\), found \(1, 3\)"):
        locked_outputs(lambda _, e: e, ["a"], torch.ones(1, 3))
