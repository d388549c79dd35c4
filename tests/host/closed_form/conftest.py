"""What tests of closed-form edits share: an empty folder of LoRAs and small transformers."""

from __future__ import annotations

import functools

import folder_paths
import pytest

from tests.host.closed_form.cross_edits import ACTED_ON, Small
from tests.host.cross_models import narrow_families


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """An empty models/loras."""
    _, extensions = folder_paths.folder_names_and_paths["loras"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], extensions))
    return tmp_path


@pytest.fixture(scope="module")
def smalls():
    """Each family's small models, built once; the families' text is as narrow meanwhile."""
    with narrow_families():
        yield functools.cache(Small)


@pytest.fixture(params=ACTED_ON)
def small(request, smalls):
    return smalls(request.param)
