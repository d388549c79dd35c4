"""Parts of ComfyUI's networks that cannot be differentiated, done by ones that can.

Only on a private copy. Most of ComfyUI's transformers ask themselves whether they are being trained
and then leave their fused kernels alone; Cosmos-Predict2 and Anima do not. LTX-Video adds to its
tokens in place, when they have been saved for the backward pass.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import comfy.ops
import torch
from comfy.ldm.common_dit import rms_norm
from comfy.ldm.cosmos.predict2 import Attention
from comfy.ldm.lightricks.model import BasicTransformerBlock as LtxvBlock
from comfy_kitchen.backends.eager.rope import rms_rope_split_half
from einops import rearrange
from torch import Tensor


def make_differentiable(network: torch.nn.Module) -> None:
    """Replace what has no gradient in a private copy of a network."""
    for module in network.modules():
        if isinstance(module, Attention) and module.is_selfattn:
            vars(module)["compute_qkv"] = MethodType(_queries_keys_values, module)
        elif isinstance(module, LtxvBlock) and not module.cross_attention_adaln:
            vars(module)["forward"] = MethodType(_block_out_of_place, module)


def _queries_keys_values(
    self: Any,
    x: Tensor,
    context: Tensor | None = None,
    rope_emb: Tensor | None = None,
    transformer_options: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, N, heads, d), as the module's own method makes them."""
    options = transformer_options or {}
    if rope_emb is None or context is not None or "attn1_patch" in options.get("patches", {}):
        return type(self).compute_qkv(self, x, context, rope_emb, options)
    q, k, v = (
        rearrange(project(x), "b ... (h d) -> b ... h d", h=self.n_heads, d=self.head_dim)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    q_scale, k_scale = (
        comfy.ops.cast_to_input(norm.weight, q) for norm in (self.q_norm, self.k_norm)
    )
    # torch's own operations; the fused kernel behind `comfy_kitchen` has no gradient.
    q, k = rms_rope_split_half(q, k, rope_emb, q_scale, k_scale, self.q_norm.eps)
    return q, k, self.v_norm(v)


def _block_out_of_place(
    self: Any,
    x: Tensor,
    context: Tensor | None = None,
    attention_mask: Tensor | None = None,
    timestep: Any = None,
    pe: Any = None,
    transformer_options: dict[str, Any] | None = None,
    self_attention_mask: Tensor | None = None,
    prompt_timestep: Tensor | None = None,
) -> Tensor:
    """Tokens (B, N, D) after a block of LTX-Video, as its own forward makes them."""
    options = transformer_options or {}
    table = self.scale_shift_table[None, None].to(device=x.device, dtype=x.dtype)
    moved = timestep.reshape(x.shape[0], timestep.shape[1], self.scale_shift_table.shape[0], -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (table + moved).unbind(dim=2)
    read = rms_norm(x) * (1 + scale) + shift
    x = x + gate * self.attn1(read, pe=pe, mask=self_attention_mask, transformer_options=options)
    x = x + self.attn2(x, context=context, mask=attention_mask, transformer_options=options)
    return x + self.ff(rms_norm(x) * (1 + scale_mlp) + shift_mlp) * gate_mlp
