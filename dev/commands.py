"""The command line of dev.py."""

from __future__ import annotations

import argparse
import signal
import sys
import time
import webbrowser
from pathlib import Path

from .bench import bench, bench_names
from .client import PromptRefused
from .demo import demo
from .prepare import Layout, make_server, prepare
from .report import Failure, clear_progress, describe_os_error, say
from .testing import test

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("demo", "test", "serve", "bench", "-h", "--help")
# Whose further options are for the program they run.
PASS_OPTIONS_ON = ("test", "bench")


def main(arguments: list[str]) -> int:
    """Run one command; every expected failure becomes one sentence and status 1."""
    parser = make_parser()
    if not arguments or arguments[0] not in COMMANDS:
        parser.print_help(sys.stderr)
        return 2
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in PASS_OPTIONS_ON:
        parser.error(f"unknown option {rest[0]}")
    # A polite kill must end the server too: turned into an exception, it passes through `with`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(options, rest)
    except Failure as failure:
        return complain(str(failure))
    except PromptRefused as refusal:
        return complain(f"ComfyUI refused the workflow: {refusal}")
    except (ConnectionError, TimeoutError) as error:
        return complain(f"The connection to ComfyUI was lost: {error}")
    except OSError as error:
        return complain(describe_os_error(error))
    except KeyboardInterrupt:
        return complain("Stopped.", 130)


def complain(sentence: str, status: int = 1) -> int:
    """Say on standard error why it did not work; returns the exit status."""
    clear_progress()
    print(sentence, file=sys.stderr, flush=True)
    return status


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="dev.py",
        description="Sets up a real ComfyUI with this pack (the first time) and runs it.",
        epilog="COMFYUI_PATH=<folder>: use that ComfyUI and its Python and download nothing.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add = commands.add_parser("demo", help="train a concept, use it, show pictures and figures")
    add.add_argument("--output", type=Path, default=ROOT / "demo-output", help="where to save them")
    commands.add_parser(
        "test",
        help="run all tests, and what computes once more as another processor would; further "
        "options go to pytest",
    )
    add = commands.add_parser("serve", help="open the web interface with the pack's templates")
    add.add_argument("--port", type=int, default=None, help="default: a free one")
    add.add_argument("--cpu", action="store_true", help="use no accelerator")
    add.add_argument("--no-browser", action="store_true", help="only print the address")
    add = commands.add_parser("bench", help="measure; further options go to the benchmark")
    add.add_argument(
        "name",
        type=lambda name: name.replace("-", "_"),
        choices=bench_names(ROOT),
        help="which benchmark",
    )
    return parser


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Dispatch a parsed command."""
    layout = Layout(ROOT)
    if options.command == "demo":
        return demo(layout, options.output.resolve())
    if options.command == "test":
        return test(layout, rest)
    if options.command == "bench":
        return bench(layout, options.name, rest)
    return serve(layout, options.port, options.cpu, not options.no_browser)


def serve(layout: Layout, port: int | None, cpu: bool, open_browser: bool) -> int:
    """Run the server until Ctrl-C, on the CPU where `cpu` says so or nothing else is there."""
    host = prepare(layout)
    say("Starting ComfyUI")
    with make_server(host, layout, port=port, cpu=cpu) as server:
        say(f"ComfyUI with Perfusion: {server.client.address}  (Ctrl-C ends it)")
        say("The pack's workflows are under Templates -> perfusion")
        if open_browser:
            webbrowser.open(server.client.address)
        assert server.process is not None
        try:
            while server.process.poll() is None:
                time.sleep(0.5)
        except KeyboardInterrupt:
            say("Stopped.")
            return 0
        raise Failure(f"ComfyUI ended by itself: {server.complaint()} (log: {server.log})")
