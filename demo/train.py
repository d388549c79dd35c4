"""Make the small world's weights: ``python -m demo.train`` from the repository's root.

Renders pictures, fits the encoder, trains the text-to-image model, the decoder on what that model
draws, and the judge, one after the other, and writes ``demo/weights``. A stopped run goes on where
it was (state in ``demo/cache``). Not part of the published pack.
"""

import argparse
import json
import logging
import math
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from inprocess import load_pack

load_pack()

from comfyui_perfusion.demo.model.small_autoencoder import SmallAutoencoder  # noqa: E402
from comfyui_perfusion.demo.model.small_model import TOKENS, load_small_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from . import train_state  # noqa: E402
from .evaluate import caption_accuracy  # noqa: E402
from .networks import Words  # noqa: E402
from .sheet import sheet  # noqa: E402
from .train_base import BaseConfig, train_base  # noqa: E402
from .train_decoder import DecoderConfig, train_decoder  # noqa: E402
from .train_encoder import make_encoder  # noqa: E402
from .train_judge import JudgeConfig, train_judge  # noqa: E402
from .world import WEIGHTS, world_weights  # noqa: E402

log = logging.getLogger("demo.train")
CACHE = Path(__file__).parent / "cache"


@dataclass(frozen=True)
class Plan:
    """Everything that determines the weights."""

    base: BaseConfig
    decoder: DecoderConfig
    judge: JudgeConfig


PLANS = {
    "small": Plan(BaseConfig(), DecoderConfig(), JudgeConfig()),
    "large": Plan(
        BaseConfig(
            minutes=18, batch=1024, window=64, channels=128, averaging=0.9995, report_every=1000
        ),
        DecoderConfig(steps=6000, batch=256, chunks=48),
        JudgeConfig(steps=4000, batch=128, chunks=48),
    ),
}
"""What two processor cores can do in an afternoon, and what one large GPU can in half an hour."""


def gather_weights(
    networks: dict[str, Tensor], ids: list[int], autoencoder: SmallAutoencoder
) -> dict[str, Tensor]:
    """Trained networks in the layout of ``demo.model.small_model.load_small_model``, in fp16.

    ``networks`` is the state of the trainer's networks; what serves training alone stays out.
    """
    weights: dict[str, Tensor] = {}
    for name, value in networks.items():
        if name.startswith("unet."):
            weights[name] = value
        elif name.endswith("token_embedding.weight"):
            weights["text.rows"] = value
        elif name.startswith("text.") and "text_projection" not in name:
            weights["text.transformer." + name.removeprefix("text.")] = value
    weights.update({"vae." + k: v for k, v in autoencoder.state_dict().items()})
    half = {k: v.detach().cpu().half().contiguous() for k, v in weights.items()}
    half[TOKENS] = torch.tensor(ids, dtype=torch.int32)
    return half


def _stop(cache: Path, keep: Path | None) -> None:
    log.info("time is up; run the same command again to go on")
    if keep:
        train_state.keep_all(cache, keep)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where to render, encode and train")
    parser.add_argument(
        "--plan", choices=list(PLANS), help="how much; by default what suits the device"
    )
    parser.add_argument("--steps", type=int, help="steps of the text-to-image model")
    parser.add_argument(
        "--base-minutes", type=float, help="or how long it learns, all pieces together"
    )
    parser.add_argument(
        "--keep", type=Path, help="where to keep a stopped run in small files for another machine"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after this time; run again to go on"
    )
    parser.add_argument(
        "--anew", action="store_true", help="leave what demo/unfinished holds alone"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the state is kept")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the weights go")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    """Do what is left to be done."""
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    device, cache, folder = arguments.device, arguments.cache, arguments.weights
    name = arguments.plan or ("large" if device == "cuda" else "small")
    plan = PLANS[name]
    how_long = ""
    if arguments.steps:
        plan = replace(plan, base=replace(plan.base, steps=arguments.steps, minutes=0.0))
        how_long = f" --steps {arguments.steps}"
    elif arguments.base_minutes:
        plan = replace(plan, base=replace(plan.base, minutes=arguments.base_minutes))
        how_long = f" --base-minutes {arguments.base_minutes:g}"
    if arguments.anew:
        train_state.FOLDER = cache / "nothing"
    until = time.time() + 60 * arguments.minutes
    cache.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)

    encoder = make_encoder(cache, plan.base.seed, device).train(False)
    trainer = train_base(cache, encoder, plan.base, device, until, name == "large")
    found = trainer and train_decoder(
        cache, trainer.average, trainer.schedule, plan.decoder, device, until
    )
    if trainer is None or found is None:
        _stop(cache, arguments.keep)
        return
    autoencoder, decoder_figures = found
    weights = gather_weights(trainer.average.state_dict(), Words().ids, autoencoder)
    save_file(weights, folder / "small_world.safetensors")
    judge, judge_report = train_judge(cache, autoencoder, plan.judge, device)
    autoencoder = autoencoder.to("cpu")
    half = {k: v.half().contiguous() for k, v in judge.state_dict().items()}
    save_file(half, folder / "judge.safetensors")

    model, clip, vae = load_small_model(world_weights(folder))
    figures, pictures, drawn = caption_accuracy(model, clip, vae, judge, count=512, seed=9_000_000)
    log.info("captions: %s", figures)
    rows = [
        part
        for pair in zip(drawn[:48].split(12), pictures[:48].split(12), strict=True)
        for part in pair
    ]
    sheet(torch.cat(rows), 12, scale=2).save(cache / "captions.png")
    record = {
        "command": f"python -m demo.train --plan {name}{how_long}",
        "device": device,
        "base": {**asdict(plan.base), "steps": trainer.step, "history": trainer.history},
        "decoder": {**asdict(plan.decoder), **decoder_figures},
        "judge": {**asdict(plan.judge), **judge_report},
        "captions": figures,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
