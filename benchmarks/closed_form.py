"""The shared solve against one inverse for every matrix, time and error: `bench closed_form`.

All projections of SD1.x (32 of width 768) and SDXL (140 of width 2048) with TIME's settings: 4
prompts of 77 tokens, lambda 0.1. The rival computes, for each matrix on its own, what the published
code computes: (lambda W + sum v c^T)(lambda I + sum c c^T)^-1 with an explicit inverse, in fp32 and
in fp64. Encodings are random with the length of CLIP's and a decaying spectrum; weights are random.
Errors are those of the change dW, against a fp64 solve in delta form of the full D x D system.

With --many N: erasing at scale, N constraints that come in parts of 2,584 (one phrase in 34
sentences of 76 tokens; 100 phrases are 258,400), against stacking all of them first; each way in a
process of its own to tell its memory, in one thread, timed by the processor.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

from perfusion.closed_form.constraints import Constraints
from perfusion.closed_form.solver import solve

from ._report import interleaved, median_ratio, print_table, write_results

RIDGE, PROMPTS, TOKENS = 0.1, 4, 77
BEFORE = 4
"""Tokens in front of the added word in each prompt, the start token among them."""
SD1_WIDTHS = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
SDXL_WIDTHS = [640] * 4 + [1280] * 20 + [1280] * 10 + [1280] * 30 + [640] * 6


@dataclass(frozen=True)
class Shape:
    """Projections of a model family: key and value of each layer, (d, D)."""

    name: str
    width: int
    layers: list[int]

    def weights(self) -> list[Tensor]:
        """Random fp32 weights of all projections."""
        random = torch.Generator().manual_seed(0)
        return [
            torch.randn(out, self.width, generator=random) * self.width**-0.5
            for out in self.layers
            for _ in ("key", "value")
        ]


SHAPES = {
    "sd1": Shape("SD1.x", 768, SD1_WIDTHS),
    "sdxl": Shape("SDXL", 2048, SDXL_WIDTHS),
    "tiny": Shape("tiny", 96, [32, 64]),
}


def encodings(width: int) -> Constraints:
    """Encodings of source and destination: each of length sqrt(D), much in common, decaying."""
    random = torch.Generator().manual_seed(1)
    count = PROMPTS * TOKENS
    spectrum = torch.arange(1, width + 1).float() ** -0.5
    axes = torch.linalg.qr(torch.randn(width, width, generator=random)).Q
    common = torch.randn(width, generator=random)

    def rows() -> Tensor:
        return torch.randn(count, width, generator=random) * spectrum @ axes.mT

    own = rows()
    source = common / common.norm() + own / own.norm(dim=1, keepdim=True)
    change = rows()
    target = source + 0.3 * change / change.norm(dim=1, keepdim=True)
    # What stands before the added word is the same in both prompts.
    same = torch.arange(count) % TOKENS < BEFORE
    target[same] = source[same]
    scale = width**0.5
    return Constraints(
        *(scale * each / each.norm(dim=1, keepdim=True) for each in (source, target))
    )


def shared(asked: Constraints, weights: list[Tensor]) -> list[Tensor]:
    """Ours: one solve, then thin factors for every projection."""
    edit = solve(asked, RIDGE)
    return [edit.factors(weight).up for weight in weights]


def inverses(asked: Constraints, weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The rival: new weights, with an inverse for each matrix."""
    source, target = asked.inputs.to(dtype), asked.targets.to(dtype)
    eye = torch.eye(source.shape[1], dtype=dtype)
    edited = []
    for weight in weights:
        old = weight.to(dtype)
        values = target @ old.mT
        left = RIDGE * old + values.mT @ source
        edited.append(left @ torch.linalg.inv(RIDGE * eye + source.mT @ source))
    return edited


def errors(asked: Constraints, weights: list[Tensor]) -> dict[str, float]:
    """Largest relative error of dW of each way, over a few of the weights."""
    source, target = asked.inputs.double(), asked.targets.double()
    system = RIDGE * torch.eye(source.shape[1], dtype=torch.float64) + source.mT @ source
    wanted = torch.linalg.solve(system, source.mT @ (target - source), left=True)  # M transposed
    edit = solve(asked, RIDGE)
    found: dict[str, list[float]] = {"shared solve": [], "inverse fp32": [], "inverse fp64": []}
    for weight in weights:
        exact = weight.double() @ wanted.mT

        def off(change: Tensor, exact: Tensor = exact) -> float:
            return float((change.double() - exact).norm() / exact.norm())

        change = edit.factors(weight)
        found["shared solve"].append(off(change.up.double() @ change.down.double()))
        for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
            (new,) = inverses(asked, [weight], dtype)
            found[f"inverse {name}"].append(off(new.double() - weight.double()))
    return {name: max(values) for name, values in found.items()}


def measure(shape: Shape, rounds: int) -> list[dict[str, object]]:
    """One row for each way: seconds of the whole edit, and its error."""
    asked, weights = encodings(shape.width), shape.weights()
    seconds = interleaved(
        {
            "shared solve": lambda: shared(asked, weights),
            "inverse fp32": lambda: inverses(asked, weights, torch.float32),
            "inverse fp64": lambda: inverses(asked, weights, torch.float64),
        },
        rounds,
        warmup=0 if shape.name == "SDXL" else 1,
    )
    off = errors(asked, weights[:: max(1, len(weights) // 4)])
    ours = seconds["shared solve"]
    edit = solve(asked, RIDGE)
    return [
        {
            "shape": shape.name,
            "projections": len(weights),
            "way": name,
            "seconds": round(statistics.median(times), 4),
            "times ours": round(median_ratio(times, ours), 1),
            "error of dW": off[name],
            "error / ours": off[name] / off["shared solve"],
            "rank": edit.rank,
            "condition": edit.condition,
        }
        for name, times in seconds.items()
    ]


PART = 34 * 76
"""Constraints of one erasure: every token but the phrase's own in each built-in sentence."""


def parts(width: int, count: int) -> Iterator[Constraints]:
    """So many constraints, one erasure's at a time, all along directions of decaying length."""
    spectrum = torch.arange(1, width + 1).float() ** -0.5
    for start in range(0, count, PART):
        random = torch.Generator().manual_seed(start)
        rows = min(PART, count - start)
        source, change = (torch.randn(rows, width, generator=random) * spectrum for _ in range(2))
        yield Constraints(source, source + 0.3 * change)


def stacked(every: Iterable[Constraints]) -> Tensor:
    """M of `perfusion.closed_form.solver` from all rows at once, a row of A^-1 for each."""
    asked = Constraints.join(list(every))
    source, target = asked.inputs.double(), asked.targets.double()
    system = source.mT @ source + RIDGE * torch.eye(asked.width, dtype=torch.float64)
    rows = torch.cholesky_solve(source.mT, torch.linalg.cholesky(system)).mT
    basis, triangle = torch.linalg.qr(rows.mT)
    return (target - source).mT @ triangle.mT @ basis.mT


def streamed(every: Iterable[Constraints]) -> Tensor:
    """The same from sums over the parts."""
    edit = solve(every, RIDGE)
    return edit.left @ edit.right


def at_scale(way: str, width: int, count: int) -> tuple[float, float, Tensor]:
    """Processor seconds, peak memory in GB beyond that of a run of two parts, and M of one way."""
    torch.set_num_threads(1)
    run = {"stacked": stacked, "streamed": streamed}[way]
    run(parts(width, 2 * PART))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    found = run(parts(width, count))
    seconds = time.process_time() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, (after - before) / 1e6, found


def measure_at_scale(width: int, count: int) -> list[dict[str, object]]:
    """One row for each way."""
    rows, known = [], {}
    for way in ("streamed", "stacked"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            work = pool.submit(at_scale, way, width, count)
            seconds, memory, known[way] = work.result()
        off = float((known[way] - known["streamed"]).norm() / known["streamed"].norm())
        rows.append(
            {
                "constraints": count,
                "width": width,
                "way": way,
                "processor seconds": round(seconds, 2),
                "memory GB": round(memory, 3),
                "differs by": off,
            }
        )
    return rows


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["sd1", "sdxl"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--many", type=int, default=0, help="constraints of an edit at scale")
    parser.add_argument("--width", type=int, default=768, help="of these constraints")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.many:
        rows = measure_at_scale(options.width, options.many)
        print_table(rows)
        if not options.no_save:
            print(write_results("closed_form_at_scale", {"ridge": RIDGE, "part": PART}, rows))
        return
    rows = [row for name in options.shapes for row in measure(SHAPES[name], options.rounds)]
    print_table(rows)
    if not options.no_save:
        settings = {"ridge": RIDGE, "prompts": PROMPTS, "tokens": TOKENS, "rounds": options.rounds}
        print(write_results("closed_form", settings, rows))


if __name__ == "__main__":
    main()
