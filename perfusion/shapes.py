"""The shapes that tensors have throughout, so that a signature says what it takes.

B is the batch (prompts), N the tokens of a prompt, D the width of the text encodings, d the
width of one projection's output, k the number of concepts. In einops notation, as everywhere.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

Encodings = Annotated[Tensor, "B N D"]
"""Text encodings, a vector for every token; functions of one token at a time take any axes
before the last."""
TokenMask = Annotated[Tensor, "B N"]
"""Bool, which tokens count."""
Gates = Annotated[Tensor, "B N k"]
"""Similarities or gates: a number for every token and concept."""
Vector = Annotated[Tensor, "D"]
"""One text encoding: a concept's input i, its dual u, its superclass's encoding."""
Outputs = Annotated[Tensor, "k d"]
"""What the concepts give out in one projection, a row each."""
Weight = Annotated[Tensor, "d D"]
"""The weight of a key or value projection."""
Moment = Annotated[Tensor, "D D"]
"""A second moment of text encodings, such as the covariance C."""
