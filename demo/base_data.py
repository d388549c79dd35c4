"""What trains the text-to-image model: latents of rendered pictures and captions for them."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from comfyui_perfusion.host.small_autoencoder import SmallAutoencoder
from torch import Tensor

from .captions import marked_captions
from .networks import Words
from .pool import chunk_specs, load_chunk, save_atomically
from .specs import LOOK, Specs
from .train_autoencoder import to_input


@dataclass
class Said:
    """Captions of some pictures, (2, n, ...), the second for their mirror images."""

    tokens: Tensor  # 2 n 77 2, int16: rows of the embedding table, owners
    named: Tensor  # n 2, bool: which things have a name of their own in these captions


@dataclass
class Data:
    """Latents (2, n, 16, 8, 8) of pictures and their mirror images, and what trains them."""

    latents: Tensor
    masks: Tensor  # n 2 8 8
    looks: Tensor  # n 2 6
    words: Words
    specs: Specs

    def said(self, seed: int, named_share: float) -> Said:
        """Fresh captions."""
        g = torch.Generator().manual_seed(seed)
        named = torch.rand(len(self.specs), 2, generator=g) < named_share
        out = []
        for mirrored in (False, True):
            specs = self.specs
            if mirrored:
                specs = replace(specs, first_is_left=~specs.first_is_left)
            texts = marked_captions(specs, seed * 2 + mirrored, named)
            out.append(self.words.encode(texts).to(torch.int16))
        return Said(torch.stack(out), named)


def _chunk_latents(
    cache: Path, autoencoder: SmallAutoencoder, chunk: int, device: str
) -> tuple[Tensor, Tensor]:
    path = cache / f"latents{chunk}.pt"
    if device == "cpu" and path.exists():
        return torch.load(path)
    pictures, masks = load_chunk(chunk, device)
    sides = []
    for side in (pictures, pictures.flip(-1)):
        parts = [autoencoder.encode(to_input(x)).half() for x in side.split(256)]
        sides.append(torch.cat(parts).contiguous())
    out = torch.stack(sides), masks
    if device == "cpu":
        save_atomically(out, path)
    return out


@torch.no_grad()
def load_data(
    cache: Path, autoencoder: SmallAutoencoder, words: Words, chunks: range, device: str
) -> Data:
    """Pictures of the given chunks, encoded; on the CPU they are kept in ``cache``."""
    latents, masks, specs = [], [], []
    for chunk in chunks:
        pair, small = _chunk_latents(cache, autoencoder, chunk, device)
        latents.append(pair)
        masks.append(small)
        specs.append(chunk_specs(chunk))
    all_specs = Specs(
        **{f.name: torch.cat([getattr(s, f.name) for s in specs]) for f in fields(Specs)}
    )
    looks = torch.stack([getattr(all_specs, name) for name in LOOK], -1)
    return Data(torch.cat(latents, 1), torch.cat(masks), looks, words, all_specs)
