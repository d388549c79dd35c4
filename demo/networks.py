"""The networks that are trained, of ComfyUI's classes, and how captions enter them."""

import math
from typing import Any

import comfy.clip_model
import comfy.ldm.modules.attention as comfy_attention
import comfy.ops
import comfy.sd1_clip
import torch
import torch.nn.functional as F
from comfyui_perfusion.demo.model.small_model import TEXT_CONFIG, build_unet
from torch import Tensor, nn

from .attention_maps import recording
from .captions import MARK, vocabulary
from .classes import CLASS_NAMES
from .specs import ALL_COLORS
from .sprites import HATS, PATTERNS

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
        self.empty = self.encode([""])

    def encode(self, texts: list[str]) -> Tensor:
        """Rows of the small embedding table and owners (n, 77, 2): start, words, end as padding.

        The owner is the number of the thing that a (marked) word is about, ``NOUN`` more for the
        noun, -1 for other words.
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


def build_networks(words: Words, channels: int) -> nn.ModuleDict:
    """UNet and text encoder, freshly initialised, of ComfyUI's classes, and names."""
    unet: Any = build_unet(channels).diffusion_model
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
    networks = nn.ModuleDict({"unet": unet, "text": text, "names": Names()})
    networks.requires_grad_(True)
    text.text_projection.requires_grad_(False)
    return networks


def alphas_cumprod(model_sampling: Any) -> Tensor:
    """Schedule of ComfyUI's own sampling object: sigma^2 = (1 - a) / a."""
    return 1 / (1 + model_sampling.sigmas.square())


class Names(nn.Module):
    """Proper names: from a thing's look to a word's vector, in training only.

    A large model has read thousands of names of things whose look no other word can tell, and so
    has a path from a word's vector to such looks. The small world invents a name for each look.
    """

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        colors = len(ALL_COLORS)
        self.sizes = (len(CLASS_NAMES), colors, colors, colors, len(PATTERNS), HATS)
        self.layers = nn.Sequential(
            nn.Linear(sum(self.sizes), width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, TEXT_CONFIG["hidden_size"]),
        )

    def forward(self, looks: Tensor) -> Tensor:
        """Vectors (n, 128) of looks (n, 6), integers in the order of ``LOOK``."""
        parts = [F.one_hot(looks[:, k], size) for k, size in enumerate(self.sizes)]
        found = self.layers(torch.cat(parts, 1).float())
        return 0.5 * F.rms_norm(found.float(), found.shape[-1:])


@comfy_attention.wrap_attn
def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **_: Any
) -> Tensor:
    """Attention in two products: on few tokens faster to differentiate than fused kernels."""
    batch, width = q.shape[0], q.shape[2]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q * (width // heads) ** -0.5, k.transpose(1, 2))
    if mask is not None:
        scores = scores + mask
    mixed = torch.bmm(scores.softmax(-1).to(v.dtype), v)
    return mixed.unflatten(0, (batch, heads)).transpose(1, 2).flatten(2)


def embed_words(text: Any, rows: Tensor) -> Tensor:
    """Vectors (n, tokens, 128) of the words, without their positions."""
    return text.text_model.embeddings.token_embedding(rows)


def encode_text(text: Any, words: Tensor) -> Tensor:
    """Last hidden states with the final norm, as CLIPTextEncode gives them: (n, tokens, 128).

    ComfyUI's own forward adds in place, which cannot be differentiated, and insists on 77 tokens.
    """
    model, length = text.text_model, words.shape[1]
    x = words + model.embeddings.position_embedding.weight[:length]
    causal = torch.full((length, length), -torch.inf, device=x.device).triu_(1)
    for layer in model.encoder.layers:
        x = x + layer.self_attn(layer.layer_norm1(x), causal, plain_attention)
        x = x + layer.mlp(layer.layer_norm2(x))
    return model.final_layer_norm(x)


def velocity(
    networks: nn.ModuleDict,
    noisy: Tensor,
    t: Tensor,
    contexts: tuple[Tensor, Tensor],
    maps: list[Tensor] | None = None,
) -> Tensor:
    """The UNet's v-prediction for noisy latents at integer timesteps.

    ``contexts`` are the encodings that keys and values come from, (n, tokens, 128) each. The
    cross-attention maps are appended to ``maps``, if there is such a list.
    """
    options = {} if maps is None else recording(maps)
    keys, values = contexts
    if values is not keys:
        options["patches"] = {"attn2_patch": [lambda n, k, v, extra: (n, k, values)]}
    return networks["unet"](noisy, t.float(), context=keys, transformer_options=options)
