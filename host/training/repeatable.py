"""Training again gives the same bits: what a GPU's libraries must be asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.utils.deterministic


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Make torch take algorithms that sum in a fixed order on a CUDA device, within the context.

    There the backward passes of attention and convolutions may add in any order unless told
    otherwise. An operation that has no other way warns and goes on. On the CPU nothing is set:
    what training runs there sums in a fixed order anyway, which depends on the number of threads.
    """
    if device.type != "cuda":
        yield
        return
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    benchmark = torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        # It finds what reads memory before writing it, and takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
        # It chooses an algorithm by how long each took just now.
        torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # pyright: ignore
        torch.backends.cudnn.benchmark = benchmark
