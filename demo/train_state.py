"""An unfinished training, small enough to be kept with the code: what another machine goes on from.

The running average of the weights in bf16, without the optimisers' memory, which a few dozen steps
bring back. ``python -m demo.train`` takes it up when its own cache holds no state; made by
``python -m demo.train_state``. Delete the folder once the weights are final.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger("demo.train")
FOLDER = Path(__file__).parent / "unfinished"


def keep(
    path: Path,
    groups: dict[str, dict[str, Tensor]],
    about: dict[str, Any],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write groups of tensors, with what is known about them as JSON beside them."""
    flat = {
        f"{name}.{k}": v.detach().cpu().to(dtype).contiguous()
        for name, state in groups.items()
        for k, v in state.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(flat, path, {"about": json.dumps(about)})
    log.info("%s: %.1f MB", path, path.stat().st_size / 1e6)


def taken_up(name: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """What ``keep_all`` kept of "encoder", "base" or "decoder", or None where it kept nothing.

    Groups of tensors in fp32 and what is known about them.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    about: dict[str, Any] = {}
    for path in sorted(FOLDER.glob(f"{name}*.safetensors")):
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            for key in file.keys():  # noqa: SIM118
                group, _, rest = key.partition(".")
                groups.setdefault(group, {})[rest] = file.get_tensor(key).float()
    return (groups, about) if groups else None


def keep_all(cache: Path, folder: Path = FOLDER) -> None:
    """Keep what the cache holds, each network in a file of its own."""
    if (cache / "encoder.pt").exists():
        model = torch.load(cache / "encoder.pt", map_location="cpu")
        exact = {k: v for k, v in model.items() if not k.startswith(("decoder", "voter"))}
        keep(folder / "encoder.safetensors", {"model": exact}, {}, torch.float32)
    for name in ("base", "decoder"):
        path = cache / f"{name}_state.pt"
        if path.exists():
            saved = torch.load(path, map_location="cpu")
            about = {k: saved[k] for k in ("config", "step", "seconds", "history") if k in saved}
            keep(folder / f"{name}_average.safetensors", {"average": saved["average"]}, about)


def forget_drawn(cache: Path) -> None:
    """Delete what an earlier state of the model drew, and the decoder that learned from it."""
    for pattern in ("drawn*.pt", "decoder_state.pt", "autoencoder.pt"):
        for path in cache.glob(pattern):
            path.unlink()


def main() -> None:
    """Keep the cache's state with the code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "cache")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    keep_all(arguments.cache)


if __name__ == "__main__":
    main()
