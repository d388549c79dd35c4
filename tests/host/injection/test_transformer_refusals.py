"""What does not fit together, or cannot take concepts, is refused by name with the reason."""

from __future__ import annotations

import comfy.supported_models as supported
import pytest
import torch
from comfy import model_base
from comfy.ldm.kandinsky5 import model as kandinsky5
from comfy.ldm.lightricks import av_model
from comfy.ldm.wan import model as wan
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import (
    UnsupportedModelError,
    family_of,
)
from comfyui_perfusion.host.models.networks import why_not
from comfyui_perfusion.perfusion import load_concept, save_concept

from tests.host.cross_models import (
    CROSS,
    META,
    base_of,
)

pytestmark = pytest.mark.usefixtures("narrow")


def test_a_concept_file_names_its_family_and_is_refused_by_another(small, smalls, worlds, tmp_path):
    file = save_concept(small.concepts[0], tmp_path / "concept.safetensors", torch.float32)
    concept = load_concept(file)
    assert concept.family == small.name
    other = smalls(next(name for name in CROSS if name != small.name))
    label, theirs = (family_of(each.model.model).label for each in (small, other))
    with pytest.raises(ValueError, match=f"trained for {label}, the model is {theirs}"):
        apply_concepts(other.model, other.clip, [concept], "twin")
    with pytest.raises(ValueError, match=f"trained for {label}, the model is Stable Diffusion 1"):
        apply_concepts(worlds.model("sd1_light"), worlds.clip("sd1"), [concept], "twin")
    loaded = apply_concepts(small.model, small.clip, [concept], "twin")
    assert torch.equal(
        worlds.encode(loaded[1], "a <a>")[0][0].as_subclass(torch.Tensor),
        worlds.encode(small.clip, "a mug")[0][0],
    )


NOT_YET = {
    "Kandinsky5": (supported.Kandinsky5, model_base.Kandinsky5, kandinsky5.Kandinsky5),
    "WAN21_Vace": (supported.WAN21_Vace, model_base.WAN21_Vace, wan.VaceWanModel),
    "LTXAV": (supported.LTXAV, model_base.LTXAV, av_model.LTXAVModel),
}


@pytest.mark.parametrize("name", NOT_YET)
def test_what_cannot_be_edited_is_refused_by_name_with_the_reason(name):
    config, base, network = NOT_YET[name]
    model = base(
        config({"image_model": "", "disable_unet_model_creation": True}),
        device=torch.device("meta"),
    )
    # The class alone tells.
    model.diffusion_model = network.__new__(network)
    with pytest.raises(UnsupportedModelError) as refused:
        family_of(model)
    assert str(refused.value).startswith(name)
    assert why_not(model.diffusion_model) in str(refused.value)
    assert len(why_not(model.diffusion_model)) > 40


def test_layers_that_rescale_the_text_at_every_step_are_refused(smalls):
    model = base_of("ltxv", {**CROSS["ltxv"].unet, "cross_attention_adaln": True}, META)
    with pytest.raises(UnsupportedModelError, match=r"LTXV.*in every layer at every step"):
        family_of(model)


def test_a_clip_of_another_family_is_refused(small, worlds):
    label = family_of(small.model.model).label
    with pytest.raises(ValueError, match=f"does not belong to {label}"):
        apply_concepts(small.model, worlds.clip("sd1"), small.concepts, "twin")
