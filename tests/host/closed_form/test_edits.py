"""Closed-form edits in ComfyUI: patches that stack, the LoRA they become, what is refused."""

from __future__ import annotations

import gc
import re
import weakref

import comfy.sd
import comfy.utils
import pytest
import torch
from comfyui_perfusion.host.closed_form.prompts import PromptEncoder
from comfyui_perfusion.host.closed_form.weight_patches import applied_edits, total_changes
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.models.families import UnsupportedModelError, cross_attentions
from comfyui_perfusion.nodes.edit_assumption import PerfusionEditAssumption
from comfyui_perfusion.nodes.save_edit import PerfusionSaveEdit
from comfyui_perfusion.perfusion.closed_form.matching import match_in_order
from comfyui_perfusion.perfusion.closed_form.solver import solve
from comfyui_perfusion.perfusion.closed_form.time import time_constraints

from tests.host.closed_form.unet_edits import SOLVING, difference, weights_of


def assume(model, clip, source="a cat", destination="a red cat", **changes):
    settings = {"augment": False, **SOLVING, **changes}
    return PerfusionEditAssumption.execute(model, clip, source, destination, **settings).args


def loaded(model, file, strength=1.0):
    """What the stock LoRA loader makes of a model."""
    content = comfy.utils.load_torch_file(str(file), safe_load=True)
    return comfy.sd.load_lora_for_models(model, None, content, strength, 0.0)[0]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_an_edit_is_the_solvers_on_every_text_projection(worlds, family):
    model, clip = worlds.model(family), worlds.clip(family)
    before = worlds.state(model)
    edited, report = assume(model, clip)
    solved = solve(time_constraints(PromptEncoder(clip), "a cat", "a red cat", False), 0.1)
    old, new = weights_of(model), weights_of(edited)
    for key, weight in old.items():
        torch.testing.assert_close(new[key], weight + solved.factors(weight).dense())
    assert difference(model, edited) > 1e-3
    assert f"{len(old)} projections edited" in report
    assert worlds.same(worlds.state(model), before)
    assert applied_edits(model) == ()


def test_prompts_are_encoded_as_the_encode_node_does_weights_included(worlds):
    clip = worlds.clip("sdxl")
    texts = ["a Cat", "a (birdbath:1.3) here", ""]
    for text, found in zip(texts, PromptEncoder(clip)(texts), strict=True):
        encoding = clip.encode_from_tokens(clip.tokenize(text))[0]
        torch.testing.assert_close(found.encodings, encoding, rtol=1e-4, atol=1e-4)
    weighted, plain = PromptEncoder(clip)(["a (cat:1.3)", "a red CAT"])
    assert match_in_order(weighted, plain)[:4] == [0, 1, 3, 4]
    assert plain.pieces[1:4] == ("a ", "red ", "cat ")


def test_a_missing_word_is_named_whole_even_when_it_is_several_tokens(worlds):
    # CLIP has no token for it.
    word = "Zyxopterix"
    with pytest.raises(ValueError, match=rf"word '{word.lower()}' of the source"):
        assume(worlds.model("small"), worlds.clip("sd1"), f"a {word} here", "a red bird here")


def test_an_article_may_change_with_the_added_word(worlds):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    edited, report = assume(model, clip, "a bag", "an expensive bag")
    assert "of which 76 ask for a change" in report
    assert difference(model, edited) > 1e-3


def test_of_many_prompts_only_the_last_ones_asked_for_are_kept(worlds):
    encode = PromptEncoder(worlds.clip("sd1"), keep=8)
    first = weakref.ref(encode(["a cat"])[0])
    alive = [weakref.ref(each) for each in encode.stream(f"a {n}" for n in range(80))]
    gc.collect()
    assert first() is None
    assert sum(each() is not None for each in alive) == 8
    asked = [f"a {n}" for n in range(12)]
    assert [each.text for each in encode(asked)] == asked
    (again,) = encode(["a 11"])
    assert encode(["a 11"])[0] is again


def test_pictures_change_with_the_edit_and_not_at_strength_zero(worlds):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    plain = worlds.sample(model, clip, "a cat")
    assert not torch.equal(worlds.sample(assume(model, clip)[0], clip, "a cat"), plain)
    off, report = assume(model, clip, strength=0.0)
    assert torch.equal(worlds.sample(off, clip, "a cat"), plain)
    assert "strength 0" in report
    assert torch.equal(worlds.sample(model, clip, "a cat"), plain)


def test_a_saved_edit_loaded_by_the_stock_loader_draws_the_same_picture(worlds, loras):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    edited, _ = assume(model, clip, strength=0.8)
    wanted = worlds.sample(edited, clip, "a cat")
    far = float((worlds.sample(model, clip, "a cat") - wanted).norm())
    for precision, allowed in (("fp32", 1e-3), ("fp16", 2e-2)):
        output = PerfusionSaveEdit.execute(edited, "mine/edit", 0, precision)
        (text,) = output.ui.as_dict()["text"]
        name = text.split(" ")[0]
        found = worlds.sample(loaded(model, loras / name), clip, "a cat")
        assert float((found - wanted).norm()) < allowed * far, precision
    # At most the number of tokens that move: 77 less "<start> a".
    assert int(re.search(r"rank (\d+),", text).group(1)) <= 75
    assert "error of the shorter rank 0" in text or "e-" in text


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sdxl_refiner"])
def test_every_projection_is_found_again_under_its_name_in_the_file(worlds, loras, family):
    model, clip = worlds.model(family), worlds.clip(family)
    edited, _ = assume(model, clip)
    PerfusionSaveEdit.execute(edited, "edit", 0, "fp32")
    (file,) = loras.glob("*.safetensors")
    assert difference(edited, loaded(model, file)) < 1e-5
    keys = set(comfy.utils.load_torch_file(str(file)))
    block = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    assert f"lora_unet_{block}.lora_up.weight" in keys


def test_a_shorter_rank_states_its_error(worlds, loras):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    edited, _ = assume(model, clip)
    output = PerfusionSaveEdit.execute(edited, "edit", 2, "fp32")
    (text,) = output.ui.as_dict()["text"]
    stated = float(text.rsplit(" ", 1)[1])
    found = loaded(model, loras / text.split(" ")[0])
    old, wanted, new = (weights_of(each) for each in (model, edited, found))
    errors = [float((new[k] - wanted[k]).norm() / (wanted[k] - old[k]).norm()) for k in old]
    assert "rank 2," in text
    assert stated == pytest.approx(max(errors), rel=0.02)


def test_edits_in_a_row_build_on_each_other_and_are_saved_as_their_sum(worlds, loras):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    first, _ = assume(model, clip, strength=0.5)
    second, _ = assume(first, clip, "a dog", "a blue dog")
    solved = solve(time_constraints(PromptEncoder(clip), "a dog", "a blue dog", False), 0.1)
    between, after = weights_of(first), weights_of(second)
    for key, weight in between.items():
        wanted = weight + solved.factors(weight).dense()
        torch.testing.assert_close(after[key], wanted, rtol=1e-4, atol=1e-5)
    PerfusionSaveEdit.execute(second, "edit", 0, "fp32")
    (file,) = loras.glob("*.safetensors")
    assert difference(second, loaded(model, file)) < 1e-5


def test_restart_drops_earlier_edits_and_keeps_other_patches(worlds):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    with_lora = worlds.with_lora(model, worlds.lora(model, 0))
    first, _ = assume(with_lora, clip, "a dog", "a blue dog")
    again, _ = assume(first, clip, restart=True)
    wanted, _ = assume(with_lora, clip)
    assert difference(wanted, again) == 0
    assert len(applied_edits(again)) == 1
    assert difference(wanted, assume(first, clip)[0]) > 1e-3


def test_a_lora_before_counts_and_a_lora_after_is_added(worlds):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    lora = worlds.lora(model, 0)
    solved = solve(time_constraints(PromptEncoder(clip), "a cat", "a red cat", False), 0.1)
    before, _ = assume(worlds.with_lora(model, lora), clip)
    after = worlds.with_lora(assume(model, clip)[0], lora)
    plain, changed = weights_of(model), weights_of(worlds.with_lora(model, lora))
    found_before, found_after = weights_of(before), weights_of(after)
    for key, weight in changed.items():
        wanted = weight + solved.factors(weight).dense()
        torch.testing.assert_close(found_before[key], wanted, rtol=1e-4, atol=1e-5)
        wanted = weight + solved.factors(plain[key]).dense()
        torch.testing.assert_close(found_after[key], wanted, rtol=1e-4, atol=1e-5)


def test_a_concept_on_an_edited_model_is_the_concept_of_the_edited_weights(worlds):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    edited, _ = assume(model, clip)
    concept = worlds.fitting_concept(model, clip, 0, "<thing>")
    changes = {key.removesuffix(".weight"): each for key, each in total_changes(edited).items()}
    lora = {
        **{f"{name}.lora_up.weight": change.up for name, change in changes.items()},
        **{f"{name}.lora_down.weight": change.down for name, change in changes.items()},
    }
    wanted_model = worlds.pure(model, [concept], lora)
    found_model, known = apply_concepts(edited, clip, [concept])
    wanted = worlds.sample(wanted_model, known, "a <thing>")
    found = worlds.sample(found_model, known, "a <thing>")
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    plain, _ = apply_concepts(model, clip, [concept])
    assert not torch.allclose(worlds.sample(plain, known, "a <thing>"), wanted, atol=1e-2)


def test_values_alone_and_chosen_layers_alone_can_be_edited(worlds):
    model, clip = worlds.model("sd1"), worlds.clip("sd1")
    old = weights_of(model)

    def changed(**settings):
        new = weights_of(assume(model, clip, **settings)[0])
        return {key for key in old if not torch.equal(old[key], new[key])}

    assert changed(with_to_k=False) == {key for key in old if ".to_v." in key}
    chosen = changed(layers="middle_block, output_blocks.3")
    assert chosen == {key for key in old if "middle_block" in key or "output_blocks.3" in key}
    with pytest.raises(ValueError, match=r"name contains 'up_blocks', so nothing would be edited"):
        assume(model, clip, layers="up_blocks")


def test_words_alone_can_be_edited_and_take_on_the_added_word(worlds):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    edited, report = assume(model, clip, carry=0.5, with_padding=False, ridge=1e-3)
    assert "constraints: 3, of which 1 " in report
    source, destination = PromptEncoder(clip)(["a cat", "a red cat"])
    _, article, red, cat = destination.encodings[:4]
    wanted = cat + 0.5 * (red - article)
    old, new = weights_of(model), weights_of(edited)
    for key in old:
        found = new[key] @ source.encodings[2]
        torch.testing.assert_close(found, old[key] @ wanted, rtol=1e-2, atol=1e-3)


def test_half_precision_models_are_edited_within_their_precision(worlds):
    model, clip = worlds.new_model("small", seed=4), worlds.clip("sd1")
    wanted = weights_of(assume(model, clip)[0])
    model.model.diffusion_model.to(torch.float16)
    found = weights_of(assume(model, clip)[0])
    for key, weight in wanted.items():
        assert float((found[key] - weight).norm() / weight.norm()) < 2e-3


def test_the_clip_of_another_family_is_refused_before_anything_is_encoded(worlds):
    with pytest.raises(UnsupportedModelError, match="loaded together with the model"):
        assume(worlds.model("small"), worlds.clip("sd2"))


def test_a_layer_that_is_not_finite_is_named(worlds):
    model = worlds.new_model("small", seed=5)
    layer = cross_attentions(model.model)[1]
    with torch.no_grad():
        layer.to_v.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=rf"{re.escape(layer.name)}\.to_v: .*finite weights"):
        assume(model, worlds.clip("sd1"))


def test_a_model_without_edits_or_a_prefix_outside_the_folder_is_not_saved(worlds, loras):
    model, clip = worlds.model("small"), worlds.clip("sd1")
    with pytest.raises(ValueError, match="carries no edit"):
        PerfusionSaveEdit.execute(model, "edit", 0, "fp16")
    with pytest.raises(ValueError, match="carries no edit"):
        PerfusionSaveEdit.execute(assume(model, clip, strength=0.0)[0], "edit", 0, "fp16")
    with pytest.raises(ValueError, match="expected a name inside"):
        PerfusionSaveEdit.execute(assume(model, clip)[0], "../edit", 0, "fp16")
    assert not any(loras.iterdir())
