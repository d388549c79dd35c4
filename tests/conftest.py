"""What all tiers share. Tiers are folders: method, host, server, browser, dev."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of the pack."""
    return ROOT
