"""Make the small world's weights: ``python -m demo.train`` from the repository's root.

Renders pictures, trains an autoencoder, the text-to-image model and the judge one after the other,
and writes ``demo/weights``. A stopped run goes on where it was (state in ``demo/cache``). Not part
of the published pack.
"""

import argparse
import json
import logging
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from inprocess import load_pack

load_pack()

from comfyui_perfusion.demo.model.small_autoencoder import SmallAutoencoder  # noqa: E402
from comfyui_perfusion.demo.model.small_model import TOKENS, load_small_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from .evaluate import caption_accuracy  # noqa: E402
from .pool import MANY_TWO, load_chunk  # noqa: E402
from .sheet import sheet  # noqa: E402
from .train_autoencoder import psnr, train_autoencoder  # noqa: E402
from .train_base import BaseConfig, train_base  # noqa: E402
from .train_judge import train_judge  # noqa: E402
from .world import WEIGHTS, world_weights  # noqa: E402

log = logging.getLogger("demo.train")
CACHE = Path(__file__).parent / "cache"
AUTOENCODER = {"steps": 2200, "batch": 24, "chunks": 3, "seed": 0}
JUDGE = {"steps": 2000, "batch": 64, "first_chunk": MANY_TWO, "chunks": 16, "seed": 0}
BASE = {
    "base": BaseConfig(steps=2100, batch=96, chunks=9, seed=0),
    "base_places": BaseConfig(
        steps=750,
        batch=96,
        chunks=16,
        seed=1,
        first_chunk=MANY_TWO,
        wide_until=0,
        attention_weight=0.05,
        matrix_rate=0.008,
        decay_share=0.0,
        full_length_share=0.0,
    ),
    "base_words": BaseConfig(
        steps=2600,
        batch=96,
        chunks=16,
        seed=2,
        first_chunk=MANY_TWO,
        wide_until=0,
        attention_weight=0.1,
        matrix_rate=0.008,
        place_first=True,
    ),
}
"""Later stages see other pictures, more of them with two things, and are told where they are."""


def export(
    networks: torch.nn.ModuleDict, ids: list[int], autoencoder: SmallAutoencoder, path: Path
) -> None:
    """One fp16 safetensors file in the layout of ``host.small_model.load_small_model``."""
    weights = {"unet." + k: v for k, v in networks["unet"].state_dict().items()}
    for name, value in networks["text"].state_dict().items():
        if name.endswith("token_embedding.weight"):
            weights["text.rows"] = value
        elif "text_projection" not in name:
            weights["text.transformer." + name] = value
    weights.update({"vae." + k: v for k, v in autoencoder.state_dict().items()})
    half = {k: v.detach().half().contiguous() for k, v in weights.items()}
    half[TOKENS] = torch.tensor(ids, dtype=torch.int32)
    path.parent.mkdir(exist_ok=True)
    save_file(half, path)
    log.info("%s: %.2f MB", path, path.stat().st_size / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the text-to-image model is trained",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=BASE["base_words"].steps,
        help="steps of the text-to-image model's last stage",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    torch.set_num_threads(arguments.threads)
    started = time.time()
    stages = {**BASE, "base_words": replace(BASE["base_words"], steps=arguments.steps)}
    CACHE.mkdir(exist_ok=True)
    autoencoder = train_autoencoder(CACHE, **AUTOENCODER).train(False).requires_grad_(False)
    networks, words, history = train_base(CACHE, autoencoder, stages, arguments.device)
    export(networks, words.ids, autoencoder, WEIGHTS / "small_world.safetensors")
    judge, judge_report = train_judge(CACHE, autoencoder, **JUDGE)
    half = {k: v.half().contiguous() for k, v in judge.state_dict().items()}
    save_file(half, WEIGHTS / "judge.safetensors")
    model, clip, vae = load_small_model(world_weights())
    figures, pictures = caption_accuracy(model, clip, vae, judge, count=256, seed=9_000_000)
    log.info("captions: %s", figures)
    sheet(pictures[:96], 16, scale=2).save(CACHE / "captions.png")
    record = {
        "command": f"python -m demo.train --steps {arguments.steps}",
        "autoencoder": {
            **AUTOENCODER,
            "held_out_psnr_db": round(psnr(autoencoder, load_chunk(CACHE, -1)[0][:512]), 2),
        },
        **{name: {**asdict(config), "history": history[name]} for name, config in stages.items()},
        "judge": {**JUDGE, **judge_report},
        "captions": figures,
        "seconds_of_this_run": round(time.time() - started),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    (WEIGHTS / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
