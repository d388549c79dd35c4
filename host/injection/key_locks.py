"""How the keys of applied concepts are locked to their superclass."""

from __future__ import annotations

from typing import Literal, get_args

KeyLock = Literal["twin", "local", "global"]
KEY_LOCKS: tuple[KeyLock, ...] = get_args(KeyLock)
DEFAULT_KEY_LOCK: KeyLock = "twin"
"""The best on likeness and on what should stay as it is, together."""
