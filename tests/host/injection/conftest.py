"""The small transformers that tests of concepts inside a model share."""

from __future__ import annotations

import functools

import pytest

from tests.host.cross_models import CROSS, narrow_families
from tests.host.cross_oracle import Small


@pytest.fixture(scope="module")
def narrow():
    """The families' small encodings."""
    with narrow_families():
        yield


@pytest.fixture(scope="module")
def smalls(worlds, narrow):
    """Each family's small models, built once."""
    return functools.cache(lambda name: Small(name, worlds))


@pytest.fixture(params=CROSS)
def small(request, smalls):
    return smalls(request.param)
