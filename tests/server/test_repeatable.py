"""A training that is cut off anywhere ends, run again, in the file of one that is not."""

from __future__ import annotations

from pathlib import Path

from benchmarks._interrupted import Moment, ServerTraining
from dev.comfyui import Host
from dev.prepare import Layout, make_server

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 12
# When the node begins, in the middle of a step, and close to the end.
MOMENTS = (Moment(0, 0.0), Moment(5, 0.02), Moment(STEPS - 3, 0.0))


def test_trainings_cut_off_at_any_moment_end_in_the_bytes_of_one_in_one_go(
    comfy_host: Host, tmp_path: Path
) -> None:
    server = make_server(comfy_host, Layout(ROOT), tmp_path)
    # The server's cache of outputs would answer the second run of the same prompt.
    server.command.append("--cache-none")
    with server:
        training = ServerTraining(server, STEPS, sample_every=0)
        training.in_one_go()
        expected = training.digest()
        for moment in MOMENTS:
            told = training.cut_off(moment)
            assert told[-1] == STEPS
            assert training.digest() == expected, moment
