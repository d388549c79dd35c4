"""Measure Covariance where a part of the model makes what is read out of the text's encodings."""

from __future__ import annotations

import folder_paths
import pytest
import torch
from comfyui_perfusion.host.models.families import UnsupportedModelError, family_of
from comfyui_perfusion.host.models.query_adapter import adapter_of
from comfyui_perfusion.nodes.training import PerfusionCovariance
from comfyui_perfusion.perfusion import Covariance

from tests.host.cross_models import CROSS, build_cross, narrow_families, randomise

CAPTIONS = "a blue bag\na mug on a table\nthe small cat and a dog"


@pytest.fixture(scope="module", autouse=True)
def _narrow():
    with narrow_families():
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/perfusion_covariance."""
    entry = ([str(tmp_path)], set())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "perfusion_covariance", entry)
    return tmp_path


def measured(clip, model=None) -> Covariance:
    """As the node measures."""
    more = {} if model is None else {"model": model}
    with torch.inference_mode():
        return PerfusionCovariance.execute(clip, CAPTIONS, **more).args[0]


def test_with_its_model_animas_is_that_of_what_the_adapter_makes(folder):
    model, clip = build_cross("anima"), CROSS["anima"].clip()
    found = measured(clip, model)
    network = model.model.diffusion_model
    assert adapter_of(model) is not None
    total, count = torch.zeros_like(found.matrix), 0
    for caption in CAPTIONS.split("\n"):
        with torch.no_grad():
            ((encoded, more),) = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
            ids = more["t5xxl_ids"]
            read = network.llm_adapter(encoded, ids[None])[0].double()
        total += read.T @ read
        count += len(ids)
    expected = total / count
    assert found.tokens == count
    # Sums of three products of `width` each in a row of the adapter's operations, in fp32.
    close = (found.width * 100) ** 0.5 * torch.finfo(torch.float32).eps
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.matrix / scale, expected / scale, rtol=0, atol=close)


def test_it_is_found_again_for_the_same_adapter_only(folder):
    clip = CROSS["anima"].clip()
    first = measured(clip, build_cross("anima"))
    again = measured(clip, build_cross("anima"))
    assert len(list(folder.iterdir())) == 1
    assert torch.equal(first.matrix, again.matrix)
    other = build_cross("anima")
    randomise(other.model.diffusion_model.llm_adapter, 7)
    assert not torch.equal(measured(clip, other).matrix, first.matrix)
    assert len(list(folder.iterdir())) == 2


def test_without_its_model_anima_is_refused_with_the_way_to_do_it(folder):
    with pytest.raises(UnsupportedModelError, match="connect the model to Measure Covariance"):
        measured(CROSS["anima"].clip())
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", [name for name in CROSS if name != "anima"])
def test_with_other_families_the_model_changes_nothing(folder, name):
    clip = CROSS[name].clip()
    alone, beside = measured(clip), measured(clip, build_cross(name))
    assert len(list(folder.iterdir())) == 1
    assert torch.equal(alone.matrix, beside.matrix)


def test_a_text_encoder_of_another_family_is_refused(folder, worlds):
    model = build_cross("anima")
    label = family_of(model.model).label
    with pytest.raises(UnsupportedModelError, match=f"the CLIP does not belong to {label}"):
        measured(worlds.clip("sd1"), model)
