"""What trains the text-to-image model: latents of the pool and captions of its pictures."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from comfyui_perfusion.demo.model.small_autoencoder import SmallAutoencoder
from torch import Tensor

from .captions import marked_captions
from .networks import Words
from .pool import chunk_specs, load_chunk, save_atomically
from .train_autoencoder import pictures_to_float


@dataclass
class Data:
    """Latents (2, n, 12, 8, 8) of pictures and their mirror images, and what trains them."""

    latents: Tensor
    masks: Tensor  # n 2 8 8
    words: Words
    chunks: range
    place_first: bool

    def tokens(self, epoch: int) -> Tensor:
        """Fresh captions for an epoch, encoded: (2, n, 77, 2), the second for mirror images."""
        out = []
        for mirrored in (False, True):
            texts: list[str] = []
            for chunk in self.chunks:
                specs = chunk_specs(chunk)
                if mirrored:
                    specs = replace(specs, first_is_left=~specs.first_is_left)
                texts += marked_captions(specs, chunk * 1000 + epoch, self.place_first)
            out.append(self.words.encode(texts))
        return torch.stack(out)


@torch.no_grad()
def load_data(
    cache: Path,
    autoencoder: SmallAutoencoder,
    words: Words,
    chunks: range,
    place_first: bool = True,
) -> Data:
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
            small = F.interpolate(mask, size=sides[0].shape[-2:], mode="area")
            save_atomically((torch.stack(sides), small.half()), path)
        pair, small = torch.load(path)
        latents.append(pair)
        masks.append(small)
    return Data(torch.cat(latents, 1), torch.cat(masks), words, chunks, place_first)
