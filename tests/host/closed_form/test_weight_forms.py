"""Closed-form edits on weights in the forms that people load: exact, or refused by name."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfy import model_patcher
from comfy.quant_ops import QuantizedTensor
from comfyui_perfusion.host.closed_form.weight_patches import applied_edits
from comfyui_perfusion.host.models.families import UnsupportedModelError, cross_attentions
from comfyui_perfusion.nodes.concepts import PerfusionApplyConcepts
from comfyui_perfusion.nodes.edit_assumption import PerfusionEditAssumption

from tests.host.closed_form.joint_models import CPU, JOINT, build_joint
from tests.host.injection import weight_formats as formats

SOLVING = {"ridge": 0.1, "with_to_k": True, "strength": 1.0, "layers": "", "restart": False}
TEXT = "a bag on the beach"


@pytest.fixture(scope="module")
def state(worlds):
    """The weights of a small UNet in fp32."""
    model = worlds.base_model("sd1_light")
    worlds.randomise(model.diffusion_model, 0)
    return {key: value.clone() for key, value in model.diffusion_model.state_dict().items()}


def assume(model, clip):
    settings = {"augment": False, "with_padding": False, **SOLVING}
    with torch.inference_mode():
        return PerfusionEditAssumption.execute(model, clip, "a bag", "an old bag", **settings).args[
            0
        ]


def changes(model) -> dict[str, torch.Tensor]:
    (edit,) = applied_edits(model)
    return {key: change.up @ change.down for key, change in edit.changes().items()}


def loaded_weight(model, key) -> torch.Tensor:
    """A weight as ComfyUI makes it of the stored one and the patches when it loads a MODEL."""
    with torch.inference_mode():
        comfy.model_management.unload_all_models()
        weight = model.patch_weight_to_device(key, return_weight=True)
        plain = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    return plain.float().clone()


# name -> the model's builder and the form's largest step, relative to a value and to the largest.
STEPS = {
    # Three bits behind the point, in both directions; the scale is that of the largest value.
    "float8_e4m3fn": (2**-3, 2**-9 / 448),
    "float8_e5m2": (2**-2, 2**-16 / 57344),
    # The same with a power of two for every block as its scale.
    "mxfp8": (2**-3, 2**-8 / 448),
    # 0, 0.5, 1, 1.5, 2, 3, 4, 6 times a block's scale, which is stored in fp8.
    "nvfp4": (2**-1, (0.5 / 6) * (1 + 2**-3)),
}


@pytest.mark.parametrize("form", STEPS)
def test_an_edit_of_a_quantised_model_is_that_of_the_weights_it_stands_for(worlds, state, form):
    clip = worlds.clip("sd1")
    model, stored = formats.quantised_by_comfyui(worlds, state, form)
    edited, plain = assume(model, clip), assume(formats.plain(worlds, stored), clip)
    found, expected = changes(edited), changes(plain)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * len(cross_attentions(model.model))
    relative, smallest = STEPS[form]
    for key, change in expected.items():
        torch.testing.assert_close(found[key], change, rtol=1e-4, atol=1e-6)
        wanted = stored[key.removeprefix("diffusion_model.")] + change
        allowed = wanted.abs() * relative + wanted.abs().max() * smallest
        # It is stored in that form again, as any LoRA on such a model is.
        assert bool(((loaded_weight(edited, key) - wanted).abs() <= allowed).all()), key
    assert torch.isfinite(worlds.sample(edited, clip, TEXT, 1)).all()


@pytest.mark.parametrize("kind", ["flux", "qwen_image"])
def test_so_is_an_edit_where_the_text_enters_a_quantised_model(kind):
    model, joint, clip = build_joint(kind), JOINT[kind], JOINT[kind].clip()
    network = model.model.diffusion_model
    stored, meant = formats.quantised_state(network.state_dict(), "float8_e4m3fn", "txt_in")
    network.load_state_dict(meant)
    config = joint.config(dict(joint.unet))
    config.quant_config = {"mixed_ops": True}
    config.set_inference_dtype(torch.float32, torch.float32)
    with torch.inference_mode():
        base = joint.base(config, device=CPU)
        base.diffusion_model.load_state_dict(stored, strict=False)
    quantised = model_patcher.CoreModelPatcher(base, load_device=CPU, offload_device=CPU)
    ((key, found),) = changes(assume(quantised, clip)).items()
    torch.testing.assert_close(found, changes(assume(model, clip))[key], rtol=1e-4, atol=1e-6)
    assert f"{joint.linear}.weight" in key
    assert isinstance(base.diffusion_model.txt_in.weight, QuantizedTensor)


@pytest.mark.parametrize(
    ("build", "called"), [(formats.packed, "PackedWeight"), (formats.replaced_maps, "LowRank")]
)
def test_weights_that_only_another_pack_can_read_are_refused_with_a_way_out(
    worlds, state, build, called
):
    model, _ = build(worlds, state)
    with pytest.raises(
        UnsupportedModelError, match=rf"holds .*attn2.* as {called}.*Save Edit as L"
    ):
        assume(model, worlds.clip("sd1"))


def test_the_lora_of_an_edit_works_on_packed_weights(worlds, state):
    clip = worlds.clip("sd1")
    edited = assume(formats.plain(worlds, state), clip)
    lora = {}
    for key, change in applied_edits(edited)[0].changes().items():
        name = key.removesuffix(".weight")
        lora |= {f"{name}.lora_up.weight": change.up, f"{name}.lora_down.weight": change.down}
    model, stored = formats.packed(worlds, state)
    plain = formats.plain(worlds, stored)
    found, expected = (
        worlds.sample(worlds.with_lora(each, lora), clip, TEXT, 1) for each in (model, plain)
    )
    base = worlds.sample(model, clip, TEXT, 1)
    far = float((expected - base).norm())
    assert far > 1e-3 * float(base.norm())
    assert float((found - expected).norm()) < 1e-2 * far


def test_an_edit_on_a_model_that_is_streamed_draws_the_same(worlds, state):
    clip, model = worlds.clip("sd1"), formats.plain(worlds, state)
    edited = assume(model, clip)
    expected = worlds.sample(edited, clip, TEXT, 1)
    assert not torch.allclose(expected, worlds.sample(model, clip, TEXT, 1), atol=1e-3)
    found = worlds.sample(formats.partly_loaded(edited.clone()), clip, TEXT, 1)
    scale = float(expected.abs().max())
    close = formats.agreement(torch.float32)
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=close)
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("node", ["concepts", "edits"])
def test_a_wrapped_network_is_named(worlds, node):
    model = build_joint("flux")
    formats.wrapped_network(model.model)
    match = r"Flux .*its network is a WrappedNetwork, which another pack put in the place"
    asked = {"edits": lambda: assume(model, worlds.clip("sd1"))}
    asked["concepts"] = lambda: apply_one(model, worlds)
    with pytest.raises(UnsupportedModelError, match=match):
        asked[node]()


def apply_one(model, worlds):
    concept = worlds.concept("sd1_light", 0, "<a>")
    return PerfusionApplyConcepts.execute(model, worlds.clip("sd1"), {"concept0": concept})


def test_a_fused_cross_attention_among_others_is_named_and_not_passed_over(worlds, state):
    model = formats.fused_attentions(worlds, state)
    match = r"FusedAttention in the place of its cross-attention 'middle_block.*cannot be reached"
    with pytest.raises(UnsupportedModelError, match=match):
        apply_one(model, worlds)
    with pytest.raises(UnsupportedModelError, match="cannot be edited in closed form"):
        assume(model, worlds.clip("sd1"))


@pytest.mark.parametrize("kind", JOINT)
def test_apply_concepts_says_of_models_of_joint_attention_what_does_work_on_them(worlds, kind):
    match = (
        r"cannot take concepts: its attention is over text and picture together; supported are "
        r"Stable Diffusion 1\.x.*\. Closed-form edits do work on it: Edit Assumption, Erase"
    )
    with pytest.raises(UnsupportedModelError, match=match):
        apply_one(build_joint(kind), worlds)
