"""Closed-form edits where the text enters a model of joint attention through one linear map."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy import model_patcher
from comfyui_perfusion.host.closed_form.readings import text_side
from comfyui_perfusion.host.models.families import UnsupportedModelError
from comfyui_perfusion.host.models.text_entries import TEXT_ENTRIES, entry_of
from comfyui_perfusion.nodes.debias import PerfusionDebias
from comfyui_perfusion.nodes.edit_assumption import PerfusionEditAssumption
from comfyui_perfusion.nodes.erase_concepts import PerfusionEraseConcepts
from comfyui_perfusion.nodes.preserve import PerfusionPreserve
from comfyui_perfusion.nodes.save_edit import PerfusionSaveEdit
from comfyui_perfusion.perfusion.closed_form.matching import match_in_order, words_of

from tests.host.closed_form.joint_models import CPU, JOINT, build_joint

SOLVING = {"ridge": 1e-4, "with_to_k": True, "strength": 1.0, "layers": "", "restart": False}
# The Llama tokenizer of transformers 5 joins words, and only single words can be matched.
JOINED = "hidream"
KINDS = list(JOINT)
SENTENCE_KINDS = [kind for kind in KINDS if kind != JOINED]


@dataclass(frozen=True)
class Pair:
    """A MODEL and its CLIP."""

    model: model_patcher.ModelPatcher
    clip: comfy.sd.CLIP


@pytest.fixture(scope="module")
def joint():
    """Gives the pair of a kind, each built once."""
    known: dict[str, Pair] = {}

    def give(kind: str) -> Pair:
        if kind not in known:
            known[kind] = Pair(build_joint(kind), JOINT[kind].clip())
        return known[kind]

    return give


def assume(pair, source="a bag", destination="an old bag", **changes):
    settings = {"augment": False, "with_padding": False, **SOLVING, **changes}
    return PerfusionEditAssumption.execute(
        pair.model, pair.clip, source, destination, **settings
    ).args


def replace_word(pair, **changes):
    """UCE's erasing of a single word, which every tokenizer can match."""
    settings = {"sentences": "{}", **SOLVING, **changes}
    return PerfusionEraseConcepts.execute(
        pair.model, pair.clip, "mug -> cup", "replacement", **settings
    ).args


def weights_of(model) -> dict[str, torch.Tensor]:
    """All 2-D weights of a MODEL as ComfyUI computes them when it loads it, and its biases."""
    comfy.model_management.unload_all_models()
    return {
        key: model.patch_weight_to_device(key, return_weight=True).float().clone()
        for key in model.model.state_dict()
        if key.startswith("diffusion_model.")
    }


def changed_keys(first, second) -> set[str]:
    a, b = weights_of(first), weights_of(second)
    return {key for key in a if not torch.equal(a[key], b[key])}


def sample(kind, model, clip, prompt="a bag", seen=None) -> torch.Tensor:
    """Latents of one step; `seen` collects what each map that reads the text is given."""
    network, hooks = model.model.diffusion_model, []
    for linear in entry_of(model.model).linears(network) if seen is not None else ():

        def note(_module, inputs, _output, path=linear.path):
            seen[path] = inputs[0].clone()

        hooks.append(network.get_submodule(linear.path).register_forward_hook(note))
    try:
        with torch.inference_mode():
            conds = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
            latent = torch.zeros(JOINT[kind].latent)
            noise = comfy.sample.prepare_noise(latent, 0)
            sampler = (1, 1.0, "euler", "simple", conds, conds, latent)
            return comfy.sample.sample(model, noise, *sampler, disable_pbar=True, seed=0)
    finally:
        for hook in hooks:
            hook.remove()


def loaded(model, file):
    """What the stock LoRA loader makes of a model."""
    content = comfy.utils.load_torch_file(str(file), safe_load=True)
    return comfy.sd.load_lora_for_models(model, None, content, 1.0, 0.0)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fits_its_own_row_and_no_other(joint, kind):
    network = joint(kind).model.model.diffusion_model
    assert [entry.name for entry in TEXT_ENTRIES if entry.fits(network)] == [kind]


@pytest.mark.parametrize("family", ["sd1_light", "sd2_light", "sdxl_light"])
def test_models_of_cross_attention_fit_no_row(worlds, family):
    assert entry_of(worlds.model(family).model) is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_encodings_solved_for_are_those_that_the_map_is_given(joint, kind):
    pair, seen = joint(kind), {}
    prompt = "mug" if kind == JOINED else "an old bag"
    sample(kind, pair.model, pair.clip, prompt, seen)
    side = text_side(pair.model, pair.clip, "", True)
    assert {key for reading in side.readings for key in reading.keys} == {
        f"diffusion_model.{path}.weight" for path in seen
    }
    for reading in side.readings:
        # The ones that put another sentence in front are not what the plain encode node gives.
        encoders = reading.encoders[:1] if kind == "lumina2" else reading.encoders
        rows = torch.cat([encode([prompt])[0].encodings for encode in encoders])
        for key in reading.keys:
            path = key.removeprefix("diffusion_model.").removesuffix(".weight")
            torch.testing.assert_close(seen[path][0], rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SENTENCE_KINDS)
def test_words_are_told_apart_and_matched_in_every_tokenizer(joint, kind):
    pair = joint(kind)
    for reading in text_side(pair.model, pair.clip, "", True).readings:
        for encode in reading.encoders:
            # "bag" begins the source, where tokenizers cut it otherwise.
            source, destination, empty = encode(["bag and mug", "an old bag, and a mug", ""])
            assert [word.text for word in words_of(source)] == ["bag", "and", "mug"]
            texts = ["an", "old", "bag", ",", "and", "a", "mug"]
            assert [word.text for word in words_of(destination)] == texts
            matched = match_in_order(source, destination)
            assert len(matched) == len(source.tokens)
            for word in words_of(source):
                (other,) = (each for each in words_of(destination) if each.text == word.text)
                assert matched[word.stop - 1] == other.stop - 1
            assert words_of(empty) == []


@pytest.mark.parametrize("kind", SENTENCE_KINDS)
def test_tokens_of_the_source_get_the_outputs_of_the_destination(joint, kind):
    pair = joint(kind)
    before = pair.model.model.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    edited, report = assume(pair)
    assert "1 projections edited" in report
    module = edited.model.diffusion_model.get_submodule(JOINT[kind].linear)
    key = f"diffusion_model.{JOINT[kind].linear}.weight"
    assert changed_keys(pair.model, edited) == {key}
    weight = weights_of(edited)[key]
    bias = None if module.bias is None else module.bias.float()
    (reading,) = text_side(pair.model, pair.clip, "", True).readings
    given, wanted = [], []
    for encode in reading.encoders:
        source, destination = encode(["a bag", "an old bag"])
        matched = match_in_order(source, destination)[: source.end]
        given.append(source.encodings[: source.end])
        wanted.append(destination.encodings[matched])
    rows, targets = torch.cat(given), torch.cat(wanted)
    asked = (rows != targets).any(1)
    found = torch.nn.functional.linear(rows[asked], weight, bias)
    with torch.inference_mode():
        old, new = module(rows[asked]), module(targets[asked])
    off = float((found - new).norm() / (old - new).norm())
    stated = float(re.search(r"asked for and not met: (\S+)", report).group(1))
    assert off == pytest.approx(stated, rel=0.05, abs=1e-3)
    # Lumina's system prompts are more tokens to hold than its encodings are wide here.
    assert off < (1.0 if kind == "lumina2" else 0.02)
    after = pair.model.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_word_speaks_as_its_anchor_in_every_map(joint, kind):
    pair = joint(kind)
    edited, _ = replace_word(pair)
    side = text_side(pair.model, pair.clip, "", True)
    old, new = weights_of(pair.model), weights_of(edited)
    touched = {key for reading in side.readings for key in reading.keys}
    assert {key for key in old if not torch.equal(old[key], new[key])} == touched
    for reading in side.readings:
        for encode in reading.encoders:
            mug, cup = (each.encodings[each.last_word] for each in encode(["mug", "cup"]))
            for key in reading.keys:
                wanted, found = old[key] @ cup, new[key] @ mug
                far = (old[key] @ mug - wanted).norm()
                assert float((found - wanted).norm()) < 0.02 * float(far), key


@pytest.mark.parametrize("kind", ["flux", "qwen_image", "z_image", "sd3"])
def test_what_is_preserved_drifts_as_little_as_is_reported(joint, kind):
    pair = joint(kind)
    (kept,) = PerfusionPreserve.execute(pair.clip, "a house in a garden\na dog", 100.0).args
    free, _ = assume(pair)
    held, report = assume(pair, preserve=kept)
    stated = float(re.search(r"drift of what is preserved: (\S+)", report).group(1))
    key = f"diffusion_model.{JOINT[kind].linear}.weight"
    old = weights_of(pair.model)[key]
    (reading,) = text_side(pair.model, pair.clip, "", True).readings
    texts = ["a house in a garden", "a dog"]
    prompts = [each for encode in reading.encoders for each in encode(texts)]
    rows = torch.cat([each.encodings[each.first :] for each in prompts])
    drifts = [
        float((rows @ (weights_of(model)[key] - old).mT).norm() / (rows @ old.mT).norm())
        for model in (held, free)
    ]
    assert drifts[0] < 0.5 * drifts[1]
    # The report looks at every so many of the tokens.
    assert drifts[0] == pytest.approx(stated, rel=0.5, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_edit_loaded_by_the_stock_loader_is_the_edit(joint, loras, kind):
    pair = joint(kind)
    edited, _ = replace_word(pair, strength=0.8)
    PerfusionSaveEdit.execute(edited, "edit", 0, "fp32")
    (file,) = loras.glob("*.safetensors")
    plain, wanted, found = (weights_of(m) for m in (pair.model, edited, loaded(pair.model, file)))
    assert any(not torch.equal(plain[key], wanted[key]) for key in plain)
    for key, weight in wanted.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["flux", "qwen_image"])
def test_the_saved_edit_draws_the_same_latents(joint, loras, kind):
    pair = joint(kind)
    plain = sample(kind, pair.model, pair.clip)
    edited, _ = assume(pair, with_padding=True, augment=True)
    wanted = sample(kind, edited, pair.clip)
    far = float((wanted - plain).norm())
    assert far > 1e-3 * float(plain.norm())
    PerfusionSaveEdit.execute(edited, "edit", 0, "fp32")
    (file,) = loras.glob("*.safetensors")
    found = sample(kind, loaded(pair.model, file), pair.clip)
    assert float((found - wanted).norm()) < 1e-3 * far
    assert torch.equal(sample(kind, assume(pair, strength=0.0)[0], pair.clip), plain)
    assert torch.equal(sample(kind, pair.model, pair.clip), plain)


def test_the_report_names_what_is_not_edited(joint):
    assert "not edited: Flux.1 also has a pooled CLIP" in assume(joint("flux"))[1]
    assert "not edited" not in assume(joint("chroma"))[1]


def test_debiasing_and_the_other_ways_of_erasing_work_too(joint):
    pair = joint("qwen_image")
    settings = {"measured": "0.9, 0.1", "wanted": "", "step": 1.0, **SOLVING}
    edited, _ = PerfusionDebias.execute(
        pair.model, pair.clip, "mug", "white {}\nblue {}", **settings
    ).args
    key = "diffusion_model.txt_in.weight"
    assert changed_keys(pair.model, edited) == {key}
    both = PerfusionEraseConcepts.execute(
        pair.model, pair.clip, "mug -> cup\nbag", "both", "a {} on a table\na {}", **SOLVING
    ).args
    assert changed_keys(pair.model, both[0]) == {key}
    (kept,) = PerfusionPreserve.execute(pair.clip, "mug", 1.0).args
    with pytest.raises(ValueError, match="contains the preserved phrase 'mug'"):
        PerfusionEraseConcepts.execute(
            pair.model, pair.clip, "old mug", "both", "", **SOLVING, preserve=kept
        )


def test_edits_add_up_and_restart_drops_them(joint):
    pair = joint("flux")
    first, _ = assume(pair)
    again, _ = assume(Pair(first, pair.clip), restart=True)
    assert changed_keys(first, again) == set()
    assert changed_keys(first, assume(Pair(first, pair.clip))[0]) != set()


@pytest.mark.parametrize("kind", ["qwen_image", "z_image"])
def test_a_prompt_that_brings_its_own_template_is_refused(joint, kind):
    with pytest.raises(ValueError, match="template of its own"):
        assume(joint(kind), "<|im_start|>user\na bag", "<|im_start|>user\nan old bag")


def test_lumina_is_edited_behind_its_system_prompts_too(joint):
    pair = joint("lumina2")
    (reading,) = text_side(pair.model, pair.clip, "", True).readings
    plain, *behind = (encode(["a bag"])[0] for encode in reading.encoders)
    assert len(behind) == 2
    for each in behind:
        assert [word.text for word in words_of(each)] == ["a", "bag"]
        assert each.first > plain.first
        assert not torch.allclose(each.encodings[each.last_word], plain.encodings[plain.last_word])


def test_a_tokenizer_that_joins_words_is_named(joint):
    pair = joint(JOINED)
    entries = pair.clip.tokenizer.llama.tokenizer.tokenize("a bag")
    if any(entry.startswith("\u0120") for entry in entries):
        assert "projections edited" in assume(pair)[1]
    else:
        with pytest.raises(ValueError, match=r"tokenizer llama .* joins the words of 'a bag'"):
            assume(pair)


def test_chosen_maps_alone_can_be_edited(joint):
    pair = joint("hidream")
    edited, _ = replace_word(pair, layers="caption_projection.1")
    assert changed_keys(pair.model, edited) == {
        "diffusion_model.caption_projection.1.linear.weight"
    }
    with pytest.raises(ValueError, match="name contains 'attn2', so nothing would be edited"):
        replace_word(pair, layers="attn2")


def test_values_alone_and_the_clip_of_another_model_are_refused(joint, worlds):
    flux, qwen = joint("flux"), joint("qwen_image")
    with pytest.raises(ValueError, match=r"Flux\.1 reads the text through one map"):
        assume(flux, with_to_k=False)
    with pytest.raises(UnsupportedModelError, match=r"does not belong to Flux\.1.*qwen25_7b"):
        assume(Pair(flux.model, qwen.clip))
    with pytest.raises(UnsupportedModelError, match="text encoder SD1ClipModel"):
        assume(Pair(flux.model, worlds.clip("sd1")))


@pytest.mark.parametrize("missing", ["vector_in", "txt_in"])
def test_a_network_of_another_structure_is_refused_by_its_name(joint, missing):
    pair = joint("flux")
    config = pair.model.model.model_config
    base = copy.deepcopy(pair.model.model, {id(config): config})
    setattr(base.diffusion_model, missing, None)
    other = model_patcher.CoreModelPatcher(base, load_device=CPU, offload_device=CPU)
    with pytest.raises(UnsupportedModelError, match=r"Flux .*What works: Stable.*Qwen-Image"):
        assume(Pair(other, pair.clip))
