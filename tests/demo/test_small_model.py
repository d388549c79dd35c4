"""The small world's model: real ComfyUI objects that draw what captions say."""

import json
import logging

import pytest
import torch

from inprocess import ROOT, load_pack

load_pack()

import comfy.sd  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from comfyui_perfusion.demo import render, specs  # noqa: E402
from comfyui_perfusion.demo.evaluate import caption_accuracy  # noqa: E402
from comfyui_perfusion.demo.fidelity import to_judge  # noqa: E402
from comfyui_perfusion.demo.generate import CFG, SAMPLER, SCHEDULER, STEPS, generate  # noqa: E402
from comfyui_perfusion.demo.judge import load_judge  # noqa: E402
from comfyui_perfusion.demo.model.small_model import load_small_model  # noqa: E402
from comfyui_perfusion.demo.world import WEIGHTS, world_weights  # noqa: E402
from comfyui_perfusion.host.files.concept_files import SHIPPED  # noqa: E402
from comfyui_perfusion.host.injection.apply import apply_concepts  # noqa: E402
from comfyui_perfusion.perfusion import load_concept  # noqa: E402


@pytest.fixture(scope="module")
def model() -> tuple:
    return load_small_model(world_weights())


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((WEIGHTS / "training.json").read_text(encoding="utf-8"))


def test_all_weights_together_are_at_most_20_megabytes() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.glob("*.safetensors")) <= 20_000_000


def test_the_loader_gives_comfyuis_own_objects(model: tuple) -> None:
    patcher, clip, vae = model
    assert isinstance(patcher, ModelPatcher)
    assert isinstance(clip, comfy.sd.CLIP)
    assert isinstance(vae, comfy.sd.VAE)


def test_weights_of_another_shape_are_refused_with_a_remedy() -> None:
    weights = world_weights()
    weights.pop("unet.out.2.weight")
    with pytest.raises(ValueError, match=r"UNet.*out\.2\.weight.*same release"):
        load_small_model(weights)


def test_plain_words_drawn_with_a_concept_are_not_taken_for_a_forgotten_text_encoder(
    model: tuple, caplog: pytest.LogCaptureFixture
) -> None:
    patcher, clip, vae = model
    concept = load_concept(SHIPPED / "bo.safetensors")
    applied, words = apply_concepts(patcher, clip, [concept], "twin")
    with caplog.at_level(logging.WARNING, "perfusion"):
        generate(applied, words, vae, ["a photo of a mug"], seed=0)
    assert "no prompt says <bo>" in caplog.text
    assert "no prompt was encoded" not in caplog.text


def test_the_vae_brings_a_rendering_back(model: tuple) -> None:
    pictures, _ = render.render(specs.sample_specs(16, seed=77))
    images = pictures.permute(0, 2, 3, 1).float() / 255
    vae = model[2]
    latents = vae.encode(images)
    assert latents.shape == (16, 24, 8, 8)
    error = (vae.decode(latents) - images).square().mean((1, 2, 3))
    assert float((-10 * torch.log10(error)).mean()) > 30


def test_the_same_seed_draws_the_same_picture(model: tuple) -> None:
    prompts = ["a photo of a red mug on the beach", "a photo of a cat in the snow"]
    first = generate(*model, prompts, seed=1)
    assert torch.equal(first, generate(*model, prompts, seed=1))
    assert not torch.equal(first, generate(*model, prompts, seed=2))


def test_the_judge_reads_renderings_about_as_well_as_recorded(record: dict) -> None:
    judge = load_judge(WEIGHTS / "judge.safetensors")
    shown = specs.sample_specs(300, seed=123, two_share=0.0)
    pictures, _ = render.render(shown)
    logits = judge.read(judge.features(to_judge(pictures)))
    right = float((logits["kind"].argmax(1) == shown.kind[:, 0]).float().mean())
    assert abs(right - record["judge"]["renderings"]["kind"]) < 0.06


def test_pictures_show_what_captions_say_about_as_often_as_recorded(
    model: tuple, record: dict
) -> None:
    judge = load_judge(WEIGHTS / "judge.safetensors")
    figures, _, _ = caption_accuracy(*model, judge, count=64, seed=8_000_000)
    for name, slack in (("kind", 0.15), ("scene", 0.15), ("color", 0.2)):
        assert figures[name] > record["captions"][name] - slack, name
        assert figures[name] > 0.6, name


def test_the_small_worlds_templates_draw_with_the_settings_that_were_measured() -> None:
    pages = sorted((ROOT / "workflows" / "api").glob("0[1-8]*.json"))
    assert len(pages) == 8
    for page in pages:
        for node in json.loads(page.read_text(encoding="utf-8")).values():
            found = node["inputs"]
            if node["class_type"] == "KSampler":
                used = [found[name] for name in ("steps", "cfg", "sampler_name", "scheduler")]
                assert used == [STEPS, CFG, SAMPLER, SCHEDULER], page.name
            assert found.get("sample_cfg", CFG) == CFG, page.name
