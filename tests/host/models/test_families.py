"""The text projections of every supported family are found; other models are refused by name."""

from __future__ import annotations

import comfy.ldm.flux.model
import comfy.ldm.lightricks.model
import comfy.supported_models
import pytest
import torch
from comfy import model_base
from comfyui_perfusion.host.models.families import (
    UnsupportedModelError,
    check_clip,
    cross_attentions,
    family_of,
    family_of_clip,
)

FULL_SIZE = [
    ("sd1", 320, 16, 12_480),
    ("sd2", 320, 16, 12_480),
    ("sdxl", 320, 70, 83_200),
]


@pytest.mark.parametrize(("family", "channels", "layers", "values"), FULL_SIZE)
def test_the_published_models_have_the_expected_layers(worlds, family, channels, layers, values):
    model = worlds.base_model(family, channels=channels, device="meta")
    found = cross_attentions(model)
    assert family_of(model).name == family
    assert len(found) == layers
    assert sum(layer.value_width for layer in found) == values
    assert sum(layer.key_width for layer in found) == values


def test_the_sdxl_refiner_is_told_from_sdxl(worlds):
    model = worlds.base_model("sdxl_refiner", channels=384, device="meta")
    assert family_of(model).name == "sdxl_refiner"
    assert {layer.input_width for layer in cross_attentions(model)} == {1280}


def test_layers_are_named_by_their_module_path(worlds):
    names = [layer.name for layer in cross_attentions(worlds.model("sd1").model)]
    assert "input_blocks.1.1.transformer_blocks.0.attn2" in names
    assert "middle_block.1.transformer_blocks.0.attn2" in names
    assert names[-1] == "output_blocks.11.1.transformer_blocks.0.attn2"


def test_a_projection_need_not_be_a_linear(worlds):
    class Quantised(torch.nn.Module):
        in_features, out_features = 768, 8

    model = worlds.base_model("sd1")
    attention = model.diffusion_model.middle_block[1].transformer_blocks[0].attn2
    attention.to_k = Quantised()
    layers = {layer.name: layer for layer in cross_attentions(model)}
    assert layers["middle_block.1.transformer_blocks.0.attn2"].key_width == 8
    assert len(layers) == 16


def test_flux_is_refused_by_name_with_the_supported_list():
    config = comfy.supported_models.Flux(
        {"image_model": "flux", "disable_unet_model_creation": True}
    )
    model = model_base.Flux(config, device=torch.device("meta"))
    with pytest.raises(UnsupportedModelError, match=r"Flux.*supported are Stable Diffusion 1\.x"):
        family_of(model)


def test_a_model_with_attn2_but_no_unet_is_refused():
    config = comfy.supported_models.LTXV(
        {"image_model": "ltxv", "disable_unet_model_creation": True}
    )
    model = model_base.LTXV(config, device=torch.device("meta"))
    with torch.device("meta"):
        model.diffusion_model = torch.nn.Module()
        model.diffusion_model.attn2 = torch.nn.Module()
        model.diffusion_model.attn2.to_k = torch.nn.Linear(2048, 8)
        model.diffusion_model.attn2.to_v = torch.nn.Linear(2048, 8)
    with pytest.raises(UnsupportedModelError, match="LTXV"):
        family_of(model)


def test_a_unet_of_an_unknown_text_width_is_refused_with_that_width(worlds):
    model = worlds.base_model("sd1")
    for layer in cross_attentions(model):
        layer.to_k.in_features = 512
    with pytest.raises(UnsupportedModelError, match=r"text width 512.*supported are"):
        family_of(model)


def test_a_unet_without_cross_attention_is_an_error_and_not_a_silent_no_op(worlds):
    model = worlds.base_model("sd1")
    for module in model.diffusion_model.modules():
        if hasattr(module, "attn2"):
            module.attn2 = None
    with pytest.raises(UnsupportedModelError, match="no cross-attention layer"):
        cross_attentions(model)


def test_a_video_unet_is_refused(worlds):
    model = worlds.base_model("sd2")
    model.model_config.unet_config["use_temporal_attention"] = True
    with pytest.raises(UnsupportedModelError, match="video model"):
        family_of(model)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl_refiner"])
def test_text_encoders_tell_their_family(worlds, family):
    assert family_of_clip(worlds.clip(family)).name == family


def test_a_clip_of_another_family_is_refused_with_both_sides_named(worlds):
    family = family_of(worlds.model("sd2").model)
    with pytest.raises(
        UnsupportedModelError, match=r"clip_h \(1024 wide\), found clip_l \(768 wide\)"
    ):
        check_clip(worlds.clip("sd1"), family)
