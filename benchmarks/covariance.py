"""How fast a covariance is measured, beside nothing but the text encoder's own forward.

    python dev.py bench covariance [--families sd1 sdxl] [--captions 256] [--rounds 3]

Both take the same captions in the same batches; the encoder alone gets them taken apart already.
Without a GPU it is the processor time of one thread that counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

from inprocess import load_pack

load_pack()

import torch  # noqa: E402
from comfyui_perfusion.host.text.captions import everyday_captions  # noqa: E402
from comfyui_perfusion.host.text.covariance import BATCH, measure_covariance  # noqa: E402
from comfyui_perfusion.host.text.text_encoders import TextEncoders  # noqa: E402

from ._models import text_encoder  # noqa: E402
from ._report import interleaved, median_ratio, print_table, write_results  # noqa: E402


def main() -> int:
    """Measure, print the table, write benchmarks/results/covariance.json."""
    parser = argparse.ArgumentParser(prog="dev.py bench covariance", description=__doc__)
    parser.add_argument("--families", nargs="+", default=["sd1", "sdxl"], choices=["sd1", "sdxl"])
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=None, help="default: the published depth")
    options = parser.parse_args()
    rows = [measure(family, options) for family in options.families]
    print_table(rows)
    print(f"Wrote {write_results('covariance', vars(options), rows, options.families)}")
    return 0


def measure(family: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one family."""
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(1)
    clip = text_encoder(family, options.layers)
    captions = list(everyday_captions(options.captions))
    text = TextEncoders(clip)
    sections = [text.section(caption) for caption in captions]
    batches = [sections[at : at + BATCH] for at in range(0, len(sections), BATCH)]

    def encoder_alone() -> None:
        with torch.no_grad():
            for batch in batches:
                text.encode(batch)

    with torch.inference_mode():
        seconds = interleaved(
            {
                "encoder": encoder_alone,
                "covariance": lambda: measure_covariance(clip, captions),
            },
            options.rounds,
            synchronise=torch.cuda.synchronize if cuda else None,
            clock=time.perf_counter if cuda else time.process_time,
        )
    return {
        "encoder": family,
        "captions": len(captions),
        "encoder alone, captions/s": len(captions) / statistics.median(seconds["encoder"]),
        "covariance, captions/s": len(captions) / statistics.median(seconds["covariance"]),
        "throughput": median_ratio(seconds["encoder"], seconds["covariance"]),
        "target": ">= 0.95",
    }


if __name__ == "__main__":
    sys.exit(main())
