"""How fast training is: against the frozen model's bare step, and against ComfyUI's Train LoRA.

    python dev.py bench train [--families sd1 sdxl] [--channels 320] [--latent 32] [--batch 4] ...

(a) "bare": the model's forward and backward to its text encodings for the same pictures and noise,
    with nothing else: no text encoder, no edit, no optimiser. It takes turns with our whole step
    inside one training run. With twin lock our step encodes no text. With local lock and a small
    --latent the text encoder, which does not shrink with the picture, has a share that it has not
    in real use: 512 pixels are --latent 64.
(b) ComfyUI's own Train LoRA node, rank 1, same pictures, effective batch, size and dtype, gradient
    checkpointing in neither (or, with --checkpointing, in both). Runs take turns; every run's first
    step, which loads, is left out. A batch of the node's computes every picture with every caption
    and takes the mean of what the captions predict; so it is also timed with one picture at a time,
    its optimiser stepping after as many as ours has in a batch.

Peak memory is what the process (or CUDA) held at most beyond what it held before a run of (b): for
both it contains a copy of the model. On a GPU times are the clock's; on a CPU the
processor time of one thread, as in the overhead benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from inprocess import load_pack

load_pack()

import comfy.model_management  # noqa: E402
import comfy_extras.nodes_train as nodes_train  # noqa: E402
import torch  # noqa: E402
from comfy import sd  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from comfyui_perfusion.host.pictures.training_images import encode_images  # noqa: E402
from comfyui_perfusion.host.text.captions import everyday_captions  # noqa: E402
from comfyui_perfusion.host.text.covariance import measure_covariance  # noqa: E402
from comfyui_perfusion.host.training.view import TrainingView, training_view  # noqa: E402
from comfyui_perfusion.perfusion import Covariance, TrainingConfig, train_concept  # noqa: E402
from comfyui_perfusion.perfusion.text.prompts import TEMPLATES, fill  # noqa: E402
from comfyui_perfusion.perfusion.training.denoiser import Batch  # noqa: E402
from comfyui_perfusion.perfusion.training.results import Progress, TrainingCallbacks  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

from ._models import PUBLISHED_CHANNELS, random_model, text_encoder  # noqa: E402
from ._report import print_table, write_results  # noqa: E402

WORDS = {"superclass": "cat", "placeholder": "<thing>"}
BARE_TARGET, PEER_TARGET = "<= 1.05", ">= 1.5"


def main() -> int:
    """Measure, print the tables, write benchmarks/results/train_*.json."""
    options = parse()
    device = torch.device("cpu" if options.cpu or not torch.cuda.is_available() else "cuda")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        torch.set_num_threads(1)
    rows = []
    for family in options.families:
        rows += Bench(family, options, device, dtype).rows()
        comfy.model_management.unload_all_models()
        gc.collect()
    print_table(rows)
    settings = {**vars(options), "device": str(device), "dtype": str(dtype)}
    measured = [f"{family}_{options.key_lock}" for family in options.families]
    print(f"Wrote {write_results('train', settings, rows, measured)}")
    return 0


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="dev.py bench train", description=__doc__)
    parser.add_argument("--families", nargs="+", default=["sd1", "sdxl"], choices=["sd1", "sdxl"])
    parser.add_argument("--channels", type=int, default=PUBLISHED_CHANNELS)
    parser.add_argument("--latent", type=int, default=32, help="side of the latent picture")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--key-lock", choices=["twin", "local"], default="twin")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each that take turns")
    parser.add_argument("--steps", type=int, default=3, help="steps a run, the first not counted")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--only-bare", action="store_true", help="part (a) alone")
    parser.add_argument("--cpu", action="store_true", help="even where there is CUDA")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: the first step is not counted, so at least 2 are needed")
    return options


class Bench:
    """One family's model with what training by either way needs."""

    def __init__(
        self, family: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.family, self.options, self.device, self.dtype = family, options, device, dtype
        self.model = random_model(family, options.channels, device, dtype)
        self.clip = text_encoder(family)
        random = torch.Generator().manual_seed(3)
        side = 8 * options.latent
        self.images = torch.rand(options.batch, side, side, 3, generator=random)
        self.latents = torch.randn(
            options.batch, 4, options.latent, options.latent, generator=random
        )
        network = TAESD(latent_channels=4)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0)
            network.vae_scale.fill_(1.0)
        self.vae = sd.VAE(sd=dict(network.state_dict()))
        with torch.inference_mode():
            self.covariance: Covariance = measure_covariance(self.clip, list(everyday_captions(64)))

    def rows(self) -> list[dict[str, Any]]:
        """The table of this family."""
        options = self.options
        ours: list[float] = []
        bare: list[float] = []
        runs: dict[str, Callable[[list[float]], None]] = {"ours": self.ours}
        for at_once in sorted({options.batch, 1}):
            name = f"Train LoRA, rank 1, {at_once} at once"
            runs[name] = functools.partial(self.peer, at_once)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        memory = dict.fromkeys(runs, 0.0)
        for turn in range(options.rounds):
            self.ours(ours, bare)
            if options.only_bare:
                continue
            for name in runs if turn % 2 else reversed(runs):
                taken, held = self.watched(runs[name])
                seconds[name].append(taken)
                memory[name] = max(memory[name], held)
        against_bare = [a / b for a, b in zip(ours, bare, strict=True)]
        rows = [
            self.row("bare step", statistics.median(bare), None, "-", None),
            self.row(
                "our step, in turn with it",
                statistics.median(ours),
                statistics.median(against_bare),
                f"time {BARE_TARGET}",
                None,
            ),
        ]
        if options.only_bare:
            return rows
        for name, taken in seconds.items():
            times = [a / b for a, b in zip(taken, seconds["ours"], strict=True)]
            rows.append(
                self.row(
                    "our step, runs in turn with Train LoRA's" if name == "ours" else name,
                    statistics.median(taken),
                    None if name == "ours" else statistics.median(times),
                    "-" if name == "ours" else f"times ours {PEER_TARGET}",
                    memory[name],
                )
            )
        return rows

    def row(
        self, name: str, seconds: float, ratio: float | None, target: str, memory: float | None
    ) -> dict[str, Any]:
        """A line of the table."""
        options = self.options
        size = f"{options.channels} channels, {options.latent} x {options.latent}"
        return {
            "model": f"{self.family}, {size}, batch {options.batch}, {options.key_lock} lock",
            "what": name,
            "s per step": seconds,
            "ratio": "-" if ratio is None else ratio,
            "target": target,
            "peak GB": "-" if memory is None else memory,
        }

    def ours(self, seconds: list[float], bare: list[float] | None = None) -> None:
        """A run of ours; with a list for it, every step is followed by a bare one."""
        options = self.options
        config = TrainingConfig(
            **WORDS,
            steps=options.steps,
            batch_size=options.batch,
            mode="twin_lock" if options.key_lock == "twin" else "perfusion",
        )
        with self.view() as view:
            ends = self.ends()

            def on_step(done: Progress) -> None:
                taken = next(ends)
                if done.step > 1:
                    seconds.append(taken)
                if bare is not None:
                    step()
                    taken = next(ends)
                    if done.step > 1:
                        bare.append(taken)

            step = bare_step(view, options.batch)
            next(ends)
            train_concept(view, config, self.covariance, TrainingCallbacks(on_step=on_step))

    def view(self) -> contextlib.AbstractContextManager[TrainingView]:
        """The model under training."""
        settings = {"gradient_checkpointing": True} if self.options.checkpointing else {}
        with torch.inference_mode():
            pictures = encode_images(self.vae, [self.images], None)
        return training_view(self.model, self.clip, pictures, **WORDS, **settings)

    def peer(self, at_once: int, seconds: list[float]) -> None:
        """A run of ComfyUI's Train LoRA node, this many pictures at once."""
        options = self.options
        with torch.inference_mode():
            texts = [fill(TEMPLATES[n % len(TEMPLATES)], "cat") for n in range(options.batch)]
            positive = []
            for text in texts:
                positive += self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))
        ends = self.ends()
        found: list[float] = []
        hook = register_optimizer_step_post_hook(lambda *_: found.append(next(ends)))
        try:
            next(ends)
            nodes_train.TrainLoraNode.execute(
                model=[self.model],
                latents=[{"samples": self.latents}],
                positive=[positive],
                batch_size=[at_once],
                steps=[options.steps],
                grad_accumulation_steps=[options.batch // at_once],
                learning_rate=[1e-4],
                rank=[1],
                optimizer=["Adam"],
                loss_function=["MSE"],
                seed=[0],
                training_dtype=["bf16" if self.dtype is torch.bfloat16 else "fp32"],
                lora_dtype=["fp32"],
                quantized_backward=[False],
                algorithm=["LoRA"],
                gradient_checkpointing=[options.checkpointing],
                checkpoint_depth=[1],
                offloading=[False],
                existing_lora=["[None]"],
                bucket_mode=[False],
                bypass_mode=[False],
            )
        finally:
            hook.remove()
        assert len(found) == options.steps, f"expected {options.steps} steps, saw {len(found)}"
        seconds += found[1:]

    def ends(self) -> Iterator[float]:
        """Each `next` gives the seconds since the last one; the first starts the clock."""
        start = self.now()
        yield 0.0
        while True:
            end = self.now()
            taken, start = end - start, end
            yield taken

    def now(self) -> float:
        """Seconds, by the clock of the device in use."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def watched(self, run: Callable[[list[float]], None]) -> tuple[float, float]:
        """Median seconds of a run's steps, and GB it held at most beyond what was held before."""
        seconds: list[float] = []
        comfy.model_management.unload_all_models()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(seconds)
            held = torch.cuda.max_memory_allocated() - before
            return statistics.median(seconds), held / 1e9
        ctypes.CDLL(None).malloc_trim(0)
        before, most, done = resident(), [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                most[0] = max(most[0], resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            run(seconds)
        finally:
            done.set()
            watcher.join()
        return statistics.median(seconds), (most[0] - before) / 1e9


def bare_step(view: TrainingView, batch: int) -> Callable[[], None]:
    """Forward and backward of the frozen model, down to its text encodings."""
    vectors = view.initial_embeddings()
    with torch.no_grad():
        encoded = view.encode([fill(t, "<thing>") for t in TEMPLATES[:batch]], vectors)
    encoded.encodings.requires_grad_(True)
    rows = Batch(
        torch.arange(batch) % view.image_count,
        torch.zeros(batch, dtype=torch.int64),
        (torch.arange(batch) + 0.5) / batch,
        torch.arange(batch),
    )

    def step() -> None:
        encoded.encodings.grad = None
        view.errors(rows, encoded, None).mean().backward()

    return step


def resident() -> int:
    """Bytes of memory this process holds (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
