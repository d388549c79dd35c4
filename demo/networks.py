"""The networks that are trained, of ComfyUI's classes, and how captions enter them."""

import math
from typing import Any

import comfy.clip_model
import comfy.ldm.modules.attention as comfy_attention
import comfy.ops
import comfy.sd1_clip
import torch
from comfyui_perfusion.demo.model.small_model import TEXT_CONFIG, build_unet
from torch import Tensor, nn

from .attention_maps import recording
from .captions import MARK, vocabulary

LENGTH = 77
"""Tokens a prompt has in ComfyUI."""


class Words:
    """Token ids of captions, by word, in a vocabulary of only the ids that occur."""

    def __init__(self) -> None:
        tokenizer = comfy.sd1_clip.SDTokenizer()
        self.start, self.end = 49406, 49407
        by_word = {
            w: [t for t, _ in tokenizer.tokenize_with_weights(w)[0][1:] if t != self.end]
            for w in vocabulary()
        }
        self.ids = sorted({i for ids in by_word.values() for i in ids} | {self.start, self.end})
        row = {token: index for index, token in enumerate(self.ids)}
        self.by_word = {w: [row[i] for i in ids] for w, ids in by_word.items()}
        self.start_row, self.end_row = row[self.start], row[self.end]

    def encode(self, texts: list[str]) -> Tensor:
        """Rows of the small embedding table and owners (n, 77, 2): start, words, end as padding.

        The owner is the number of the thing that a (marked) word is about, else -1.
        """
        out = torch.tensor([self.end_row, -1]).repeat(len(texts), LENGTH, 1)
        out[:, 0, 0] = self.start_row
        for line, text in zip(out, texts, strict=True):
            said = []
            for marked in text.replace(",", " , ").split():
                word, _, owner = marked.partition(MARK)
                said += [(row, int(owner or -1)) for row in self.by_word[word]]
            if said:
                line[1 : 1 + len(said)] = torch.tensor(said)
        return out


def build_networks(words: Words) -> nn.ModuleDict:
    """UNet and text encoder, freshly initialised, of ComfyUI's classes."""
    unet: Any = build_unet().diffusion_model
    text: Any = comfy.clip_model.CLIPTextModel(
        TEXT_CONFIG, torch.float32, "cpu", comfy.ops.disable_weight_init
    )
    text.text_model.embeddings.token_embedding = nn.Embedding(
        len(words.ids), TEXT_CONFIG["hidden_size"]
    )
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.dim() > 1:
                bound = 0.05 if p.dim() == 4 else 1.0
                nn.init.normal_(p, std=min(1 / math.sqrt(p[0].numel()), bound))
            else:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
        for name, module in unet.named_modules():
            if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
                module.weight.zero_()
                module.bias.zero_()
        for name, p in text.named_parameters():
            if "embedding" in name:
                nn.init.normal_(p, std=0.5 if "token" in name else 0.1)
            elif p.dim() > 1:
                narrow = 0.5 if ("out_proj" in name or "fc2" in name) else 1.0
                nn.init.normal_(p, std=narrow / math.sqrt(p.shape[1]))
            else:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
    networks = nn.ModuleDict({"unet": unet, "text": text})
    networks.requires_grad_(True)
    text.text_projection.requires_grad_(False)
    return networks


def alphas_cumprod(model_sampling: Any) -> Tensor:
    """Schedule of ComfyUI's own sampling object: sigma^2 = (1 - a) / a."""
    return 1 / (1 + model_sampling.sigmas.square())


def encode_text(text: Any, rows: Tensor) -> Tensor:
    """Last hidden states with the final norm, as CLIPTextEncode gives them: (n, tokens, 128).

    ComfyUI's own forward adds in place, which cannot be differentiated, and insists on 77 tokens.
    """
    model, length = text.text_model, rows.shape[1]
    x = model.embeddings.token_embedding(rows) + model.embeddings.position_embedding.weight[:length]
    causal = torch.full((length, length), -torch.inf, device=x.device).triu_(1)
    for layer in model.encoder.layers:
        x = x + layer.self_attn(layer.layer_norm1(x), causal, comfy_attention.attention_pytorch)
        x = x + layer.mlp(layer.layer_norm2(x))
    return model.final_layer_norm(x)


def velocity(
    networks: nn.ModuleDict,
    noisy: Tensor,
    t: Tensor,
    rows: Tensor,
    maps: list[Tensor] | None = None,
) -> Tensor:
    """The UNet's v-prediction for noisy latents at integer timesteps and caption rows (n, tokens).

    Its cross-attention maps are appended to ``maps``, if there is such a list.
    """
    options = {} if maps is None else recording(maps)
    context = encode_text(networks["text"], rows)
    return networks["unet"](noisy, t.float(), context=context, transformer_options=options)
