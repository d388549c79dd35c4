"""The models of the host's tests, on a GPU that is not there."""

from __future__ import annotations

from tests.host.conftest import _concepts_elsewhere, _covariances_elsewhere, worlds

__all__ = ["_concepts_elsewhere", "_covariances_elsewhere", "worlds"]
