"""Training of the small world's text-to-image model: text encoder and UNet together."""

import copy
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.clip_model
import comfy.ldm.modules.attention as comfy_attention
import comfy.ops
import comfy.sd1_clip
import torch
import torch.nn.functional as F
from comfyui_perfusion.host.small_autoencoder import SmallAutoencoder
from comfyui_perfusion.host.small_model import TEXT_CONFIG, TIMESTEPS, build_unet
from torch import Tensor, nn

from .captions import captions, vocabulary
from .muon import Muon, split_parameters
from .pool import chunk_specs, load_chunk, save_atomically
from .train_autoencoder import pictures_to_float

log = logging.getLogger("demo.train")
LENGTH, SHORT = 77, 32
"""Tokens a prompt has in ComfyUI, and the fewer that most training steps make do with."""


@dataclass(frozen=True)
class BaseConfig:
    """What determines the weights (with the autoencoder): recorded beside them."""

    steps: int
    batch: int
    chunks: int
    seed: int
    matrix_rate: float = 0.01
    other_rate: float = 1e-3
    averaging: float = 0.998
    thing_weight: float = 2.0
    empty_share: float = 0.1
    short_share: float = 0.75
    decay_share: float = 0.5
    full_length_share: float = 0.15
    wide_until: int = 1250
    timesteps: int = TIMESTEPS

    @property
    def decay_start(self) -> int:
        """From this step on the rate falls in a line to 2 %.

        Before it nothing depends on ``steps``: a run can be made longer or shorter while it runs.
        """
        return int(self.steps * (1 - self.decay_share))

    def rate(self, step: int) -> float:
        """Share of the full learning rate at ``step``."""
        left = (self.steps - step) / (self.steps - self.decay_start)
        return min(1.0, (step + 1) / 50, 0.02 + 0.98 * left)


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
        """Rows of the small embedding table (n, 77): start, words, then end as padding."""
        out = torch.full((len(texts), LENGTH), self.end_row)
        out[:, 0] = self.start_row
        for line, text in zip(out, texts, strict=True):
            rows = [r for word in text.replace(",", " , ").split() for r in self.by_word[word]]
            line[1 : 1 + len(rows)] = torch.tensor(rows)
        return out


def build_networks(words: Words) -> nn.ModuleDict:
    """UNet and text encoder, freshly initialised, of ComfyUI's classes."""
    unet = build_unet().diffusion_model
    text = comfy.clip_model.CLIPTextModel(
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


def alphas_cumprod(model_sampling: nn.Module) -> Tensor:
    """Schedule of ComfyUI's own sampling object: sigma^2 = (1 - a) / a."""
    return 1 / (1 + model_sampling.sigmas.square())


@dataclass
class Data:
    """Latents (2, n, 12, 8, 8) of pictures and their mirror images, and what trains them."""

    latents: Tensor
    masks: Tensor  # n 1 8 8
    words: Words
    chunks: range

    def tokens(self, epoch: int) -> Tensor:
        """Fresh captions for an epoch: rows (2, n, 77), the second for mirror images."""
        out = []
        for mirrored in (False, True):
            texts: list[str] = []
            for chunk in self.chunks:
                specs = chunk_specs(chunk)
                if mirrored:
                    specs = replace(specs, first_is_left=~specs.first_is_left)
                texts += captions(specs, seed=chunk * 1000 + epoch)
            out.append(self.words.encode(texts))
        return torch.stack(out)


@torch.no_grad()
def load_data(cache: Path, autoencoder: SmallAutoencoder, words: Words, chunks: range) -> Data:
    """Encode the pool once; kept in ``cache``."""
    latents, masks = [], []
    for chunk in chunks:
        path = cache / f"latents{chunk}.pt"
        if not path.exists():
            pictures, mask = load_chunk(cache, chunk)
            sides = []
            for side in (pictures, pictures.flip(-1)):
                sides.append(
                    torch.cat(
                        [autoencoder.encode(pictures_to_float(x)).half() for x in side.split(256)]
                    )
                )
            small = F.interpolate(mask[:, None], size=sides[0].shape[-2:], mode="area")
            save_atomically((torch.stack(sides), small.half()), path)
        pair, small = torch.load(path)
        latents.append(pair)
        masks.append(small)
    return Data(torch.cat(latents, 1), torch.cat(masks), words, chunks)


def encode_text(text: nn.Module, rows: Tensor) -> Tensor:
    """Last hidden states with the final norm, as CLIPTextEncode gives them: (n, tokens, 128).

    ComfyUI's own forward adds in place, which cannot be differentiated, and insists on 77 tokens.
    """
    model, length = text.text_model, rows.shape[1]
    x = model.embeddings.token_embedding(rows) + model.embeddings.position_embedding.weight[:length]
    causal = torch.full((length, length), -torch.inf).triu_(1)
    for layer in model.encoder.layers:
        x = x + layer.self_attn(layer.layer_norm1(x), causal, comfy_attention.attention_pytorch)
        x = x + layer.mlp(layer.layer_norm2(x))
    return model.final_layer_norm(x)


def velocity(networks: nn.ModuleDict, noisy: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    """The UNet's v-prediction for noisy latents at integer timesteps and caption rows."""
    return networks["unet"](noisy, t.float(), context=encode_text(networks["text"], rows))


def _noised(x: Tensor, t: Tensor, schedule: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    a, s = schedule[t].sqrt().view(-1, 1, 1, 1), (1 - schedule[t]).sqrt().view(-1, 1, 1, 1)
    return a * x + s * noise, a * noise - s * x


@torch.no_grad()
def evaluate(
    networks: nn.ModuleDict, data: Data, schedule: Tensor, count: int = 512
) -> dict[str, float]:
    """Held-out v-loss, and how much of it the caption explains at middle timesteps."""
    g = torch.Generator().manual_seed(3)
    x = data.latents[0, :count].float()
    t = ((torch.arange(count) + 0.5) / count * 1000).long()[torch.randperm(count, generator=g)]
    noisy, target = _noised(x, t, schedule, torch.randn(x.shape, generator=g))
    full = data.tokens(0)[0, :count]
    empty = data.words.encode([""]).expand(count, -1)
    losses = []
    for rows in (full, empty):
        parts = [
            velocity(networks, noisy[i : i + 64], t[i : i + 64], rows[i : i + 64])
            for i in range(0, count, 64)
        ]
        losses.append((torch.cat(parts) - target).square().mean((1, 2, 3)))
    middle = (t >= 250) & (t < 700)
    return {
        "loss": float(losses[0].mean()),
        "caption_gain": float((losses[1] - losses[0])[middle].mean()),
    }


def _batches(count: int, batch: int, seed: int, epoch: int) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
    yield from order[: count // batch * batch].split(batch)


def train_base(
    cache: Path, autoencoder: SmallAutoencoder, config: BaseConfig
) -> tuple[nn.ModuleDict, Words, list[dict[str, float]]]:
    """Train to the end or go on where a stopped run left off; returns averaged networks and log."""
    comfy_attention.optimized_attention = comfy_attention.attention_pytorch
    comfy_attention.optimized_attention_masked = comfy_attention.attention_pytorch
    words = Words()
    state_path = cache / "base_state.pt"
    torch.manual_seed(config.seed)
    networks = build_networks(words)
    average = copy.deepcopy(networks).requires_grad_(False)
    schedule = alphas_cumprod(build_unet().model_sampling)
    not_for_muon = (
        "unet.input_blocks.0.",
        "unet.out.",
        "unet.time_embed",
        "text.text_model.embeddings",
    )
    matrices, rest = split_parameters(networks.named_parameters(), not_for_muon)
    embeddings = {id(p) for p in networks["text"].text_model.embeddings.parameters()}
    groups = [
        {"params": [p for p in rest if id(p) not in embeddings], "scale": 1.0},
        {"params": [p for p in rest if id(p) in embeddings], "scale": 3.0},
    ]
    muon = Muon(matrices, lr=config.matrix_rate)
    adam = torch.optim.AdamW(groups, lr=config.other_rate, betas=(0.9, 0.98), weight_decay=0.0)
    step, history, seconds = 0, [], 0.0
    if state_path.exists():
        saved = torch.load(state_path, weights_only=False)
        step = saved["step"]
        longer = replace(saved["config"], steps=config.steps)
        if longer != config or (
            saved["config"] != config
            and step > min(config.decay_start, saved["config"].decay_start)
        ):
            raise SystemExit(
                f"{state_path} was made with {saved['config']}, not {config}; "
                "delete it to start anew"
            )
        networks.load_state_dict(saved["networks"])
        average.load_state_dict(saved["average"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        history, seconds = saved["history"], saved["seconds"]
    data = load_data(cache, autoencoder, words, range(config.chunks))
    held_out = load_data(cache, autoencoder, words, range(-1, 0))
    count = data.latents.shape[1]
    per_epoch = count // config.batch
    empty = words.encode([""])[0]
    started, running = time.time() - seconds, 0.0

    def save() -> None:
        save_atomically(
            {
                "config": config,
                "networks": networks.state_dict(),
                "average": average.state_dict(),
                "muon": muon.state_dict(),
                "adam": adam.state_dict(),
                "step": step,
                "history": history,
                "seconds": time.time() - started,
            },
            state_path,
        )

    while step < config.steps:
        epoch = step // per_epoch
        tokens = data.tokens(epoch)
        for number, index in enumerate(_batches(count, config.batch, config.seed, epoch)):
            if epoch * per_epoch + number < step:
                continue
            if step >= config.steps:
                break
            g = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            mirrored = (torch.rand(config.batch, generator=g) < 0.5).long()
            x, rows, mask = (
                data.latents[mirrored, index].float(),
                tokens[mirrored, index],
                data.masks[index].float(),
            )
            mask = torch.where(mirrored.view(-1, 1, 1, 1) > 0, mask.flip(-1), mask)
            rows = torch.where(
                torch.rand(config.batch, 1, generator=g) < config.empty_share, empty, rows
            )
            full_length = step >= config.steps * (1 - config.full_length_share)
            if not full_length and float(torch.rand(1, generator=g)) < config.short_share:
                rows = rows[:, :SHORT]
            # The first part sees all noise levels of the schedule, the rest only those in use.
            levels = len(schedule) if step < config.wide_until else config.timesteps
            strata = (torch.arange(config.batch) + torch.rand(1, generator=g)) / config.batch
            t = (strata * levels).long().clamp(max=levels - 1)
            noisy, target = _noised(x, t, schedule, torch.randn(x.shape, generator=g))
            factor = config.rate(step)
            for group in adam.param_groups:
                group["lr"] = config.other_rate * factor * group["scale"]
            for group in muon.param_groups:
                group["lr"] = config.matrix_rate * factor
            weight = (1 + config.thing_weight * mask) / (1 + 0.2 * config.thing_weight)
            loss = ((velocity(networks, noisy, t, rows) - target).square() * weight).mean()
            muon.zero_grad(set_to_none=True)
            adam.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(rest, 1.0)
            muon.step()
            adam.step()
            keep = 1 - min(config.averaging, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(networks.parameters()), keep)
            step += 1
            running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
            if step % 50 == 0:
                log.info(
                    "base %d/%d  loss %.4f  %.0f s",
                    step,
                    config.steps,
                    running,
                    time.time() - started,
                )
            if step % 250 == 0 or step == config.steps:
                history.append(
                    {
                        "step": step,
                        "seconds": round(time.time() - started),
                        "train": running,
                        **evaluate(average, held_out, schedule),
                    }
                )
                log.info("held out: %s", history[-1])
                save()
    return average, words, history
