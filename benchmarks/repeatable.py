"""Whether the same training ends in the same bytes: with more threads, and cut off at any moment.

    python dev.py bench repeatable [--threads 1 2 4] [--trainings 10] [--interrupts 14] ...

The demo's training at its full length, again and again:

(a) in a real ComfyUI server, template 1: uninterrupted, and interrupted at random moments and then
    run again; the concept of the last step and the file of losses are hashed.
(b) in one process, with each number of threads and each of the two locks; all that a training's
    state holds (what is learned, the optimiser's moments, random numbers, losses) is hashed.

Every row should have one hash. Numbers of threads are not expected to agree with each other: torch
splits some sums by them.
"""

from __future__ import annotations

import os

# Threads that spin while they wait would take the core from those that work, where others do.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inprocess import load_pack

load_pack()

from comfyui_perfusion.host.pictures.training_images import encode_images  # noqa: E402
from comfyui_perfusion.host.training.view import training_view  # noqa: E402
from comfyui_perfusion.perfusion import TrainingConfig, train_concept  # noqa: E402
from comfyui_perfusion.perfusion.training.config import Mode  # noqa: E402

from demo.measure import LEARNING_RATE, PLACEHOLDER, SUBJECT, World  # noqa: E402
from demo.things import superclass_of  # noqa: E402
from demo.train_concepts import STEPS  # noqa: E402
from demo.world import personal_pictures  # noqa: E402
from dev.prepare import Layout, make_server, prepare  # noqa: E402

from ._interrupted import ServerTraining  # noqa: E402
from ._report import print_table, write_results  # noqa: E402

LOCKS = ("twin_lock", "perfusion")
ROOT = Path(__file__).parent.parent


def main() -> int:
    """Train, print the table, write benchmarks/results/repeatable.json; 1 unless all agree."""
    options = parse()
    rows: list[dict[str, Any]] = []
    for found in measured(options):
        rows.append(found)
        # After every row: the whole takes long.
        print_table([found])
        sys.stdout.flush()
        write_results("repeatable", vars(options), rows)
    print_table(rows)
    return int(any(row["hashes"] != 1 for row in rows))


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows, one after the other."""
    if options.uninterrupted:
        yield in_server(options)
    if options.threads:
        world = World()
        for threads in options.threads:
            for lock in options.locks:
                yield in_process(world, lock, threads, options)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="dev.py bench repeatable", description=__doc__)
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--locks", nargs="+", default=LOCKS, choices=LOCKS)
    parser.add_argument("--trainings", type=int, default=10, help="of each, in one process")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--uninterrupted", type=int, default=5, help="runs in a server, or 0")
    parser.add_argument("--interrupts", type=int, default=14, help="runs in it that are cut off")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args()


def in_process(
    world: World, lock: Mode, threads: int, options: argparse.Namespace
) -> dict[str, Any]:
    """A row: trainings of the demo's model with a number of threads."""
    torch.set_num_threads(threads)
    seconds, hashes = [], []
    for _ in range(options.trainings):
        started = time.perf_counter()
        hashes.append(training(world, lock, options.steps))
        seconds.append(time.perf_counter() - started)
    return row(lock.replace("_", " "), threads, seconds, hashes)


def training(world: World, lock: Mode, steps: int) -> str:
    """One training; the hash of its state."""
    config = TrainingConfig(
        PLACEHOLDER,
        superclass_of(SUBJECT),
        steps=steps,
        batch_size=4,
        learning_rate=LEARNING_RATE,
        schedule="cosine",
        mode=lock,
    )
    images, masks = personal_pictures(SUBJECT, 5, 0)
    shown = encode_images(world.vae, [images], [masks])
    with training_view(
        *(world.model, world.clip, shown, config.superclass, config.placeholder)
    ) as view:
        return digest(train_concept(view, config, world.covariance(config.mode)).state.tensors)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names and bits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def in_server(options: argparse.Namespace) -> dict[str, Any]:
    """A row: the training template in a server, uninterrupted and interrupted."""
    layout = Layout(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        # Its own cache of outputs would answer the second run of the same prompt.
        server = make_server(prepare(layout), layout, Path(folder), cpu=True)
        server.command.append("--cache-none")
        with server:
            runs = ServerTraining(server, options.steps)
            seconds: list[float] = []
            hashes = [once(runs, seconds) for _ in range(options.uninterrupted)]
            moments = runs.moments(options.interrupts, options.seed, min(seconds) / options.steps)
            for moment in moments:
                runs.cut_off(moment)
                hashes.append(runs.digest())
    what = f"server: {options.uninterrupted} in one go, {options.interrupts} interrupted"
    # The server's process takes the number that this one took.
    return row(what, torch.get_num_threads(), seconds, hashes)


def once(runs: ServerTraining, seconds: list[float]) -> str:
    """A training in one go, and how long it took."""
    started = time.perf_counter()
    runs.in_one_go()
    seconds.append(time.perf_counter() - started)
    return runs.digest()


def row(
    what: str, threads: int | str, seconds: Sequence[float], hashes: Sequence[str]
) -> dict[str, Any]:
    """A line of the table."""
    return {
        "what": what,
        "threads": threads,
        "runs": len(hashes),
        "hashes": len(set(hashes)),
        "hash": hashes[0][:8],
        "median s": statistics.median(seconds),
    }


if __name__ == "__main__":
    sys.exit(main())
