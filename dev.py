"""python dev.py demo | test | serve | bench: what a newcomer or developer needs, set up by itself.

Standard library only. What it sets up lands in the ignored folders `.venv`, `.comfyui` and
`.cache` beside this file; remove them to start afresh. The work is done by the modules in `dev/`.
"""

from __future__ import annotations

import sys

OLDEST_PYTHON = (3, 11)


def main() -> int:
    """Run one command; returns the exit status."""
    if sys.version_info[:2] < OLDEST_PYTHON:
        # Before any import of ours: they use what older Pythons cannot read.
        found = f"{sys.version_info[0]}.{sys.version_info[1]} ({sys.executable})"
        sys.stderr.write(
            f"dev.py needs Python 3.11 or newer and this is Python {found}: "
            "run it with a newer one, for example: python3.11 dev.py demo\n"
        )
        return 1
    from dev import commands

    return commands.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
