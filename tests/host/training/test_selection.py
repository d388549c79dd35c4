"""Choosing a checkpoint by its pictures, with ComfyUI's own CLIP vision and text models."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfy.clip_vision import ClipVisionModel
from comfyui_perfusion.host.models.families import encoder_models
from comfyui_perfusion.host.text.text_encoders import TextEncoders
from comfyui_perfusion.host.training.selection import _OTHER_WORDS, Checkpoint, score_checkpoints

SIDE = 32
PROMPTS = ["a <thing> on a beach", "a photo of a <thing> at night"]
WORDS = [prompt.replace("<thing>", "cat") for prompt in PROMPTS]


def build_vision(worlds, kind: str = "clip_vision_model", width: int = 768) -> ClipVisionModel:
    """A CLIP vision model of a few small layers with random weights."""
    config = {
        "model_type": kind,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
        "image_size": SIDE,
        "patch_size": 8,
    }
    if kind == "clip_vision_model":
        config["projection_dim"] = width
    vision = ClipVisionModel(config)
    worlds.randomise(vision.model, 3)
    return vision


@pytest.fixture(scope="module")
def vision(worlds):
    return build_vision(worlds)


@pytest.fixture(scope="module")
def concept(worlds):
    return worlds.concept("sd1")


def pictures(things: torch.Tensor, scenes: torch.Tensor) -> torch.Tensor:
    """Things (n, 3) in the middle of scenes (n, 3), as plain colours: (n, SIDE, SIDE, 3)."""
    drawn = scenes[:, None, None].repeat(1, SIDE, SIDE, 1)
    drawn[:, 8:24, 8:24] = things[:, None, None]
    return drawn


THING, KIND = torch.tensor([[1.0, 0.1, 0.8]]), torch.tensor([[0.5, 0.5, 0.3]])
STUDIO = torch.tensor([[0.9, 0.9, 0.9]])
SCENES = torch.tensor([[0.9, 0.8, 0.2], [0.0, 0.0, 0.25]])
TRAINING = pictures(THING, STUDIO).expand(3, -1, -1, -1)
PLAIN = pictures(KIND.expand(2, -1), SCENES)
# What a run draws as it goes on: the kind of thing in the scene, this thing in the scene, and in
# the end the training pictures whatever the prompt says.
UNTRAINED, RIGHT, OVERTRAINED = PLAIN, pictures(THING.expand(2, -1), SCENES), TRAINING[:2]


def run(vision, clip, concept, **changes):
    given = {
        "checkpoints": [
            Checkpoint(step, concept, drawn)
            for step, drawn in ((100, UNTRAINED), (200, RIGHT), (300, OVERTRAINED))
        ],
        "images": list(TRAINING),
        "prompts": PROMPTS,
        "plain": PLAIN,
    }
    return score_checkpoints(vision, clip, **{**given, **changes})


def embed(vision, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vision.encode_image(images)["image_embeds"]


def pooled(clip, name: str, prompts: list[str]) -> torch.Tensor:
    """What the text encoder makes of prompts before its projection, (n, d)."""
    text = TextEncoders(clip)
    model = encoder_models(clip)[name]
    model.set_clip_options({"projected_pooled": False})
    sections = [text.sections(prompt)[name][0] for prompt in prompts]
    with torch.no_grad():
        found = torch.cat([model.encode([section])[1] for section in sections])
    clip.cond_stage_model.reset_clip_options()
    return found


def fit_projection(vision, clip, name: str) -> torch.Tensor:
    """Give a text encoder the projection that maps a few texts onto pictures of them.

    Least squares over the very texts and pictures; returns the prompts' targets (2, d).
    """
    generator = torch.Generator().manual_seed(4)
    colours = torch.rand(len(_OTHER_WORDS), 3, generator=generator)
    others = pictures(colours, colours.flip(0))
    own, shown = embed(vision, TRAINING[:1]), embed(vision, PLAIN)
    targets = torch.cat([own, shown, embed(vision, others)]).double()
    texts = ["a photo of a cat", *WORDS, *(f"a photo of a {word}" for word in _OTHER_WORDS)]
    inputs = pooled(clip, name, texts).double()
    weight = torch.linalg.lstsq(inputs, targets, driver="gelsd").solution.mT
    projection = encoder_models(clip)[name].transformer.text_projection
    with torch.no_grad():
        projection.weight.copy_(weight)
    return shown


def cosines(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(first, second, dim=-1)


def test_the_checkpoint_with_this_thing_in_the_scene_asked_for_is_chosen(worlds, vision, concept):
    chosen = run(vision, worlds.clip("sd1"), concept)
    assert chosen.best.step == 200
    first, middle, last = chosen.scores
    assert first.image < middle.image < last.image
    assert first.prompt > middle.prompt > last.prompt


def test_scores_are_those_of_a_computation_by_hand(worlds, vision, concept):
    chosen = run(vision, worlds.clip("sd1"), concept)
    training, plain = embed(vision, TRAINING), embed(vision, PLAIN)
    for score, drawn in zip(chosen.scores, (UNTRAINED, RIGHT, OVERTRAINED), strict=True):
        found = embed(vision, drawn)
        assert score.image == pytest.approx(float(cosines(found[:, None], training).mean()), 1e-5)
        assert score.prompt == pytest.approx(float(cosines(found, plain).mean()), 1e-5)


def test_choosing_twice_gives_the_same(worlds, vision, concept):
    first, second = (run(vision, worlds.clip("sd1"), concept) for _ in range(2))
    assert first.scores == second.scores
    assert first.report == second.report


def test_the_report_lists_every_checkpoint_and_says_how_prompts_were_compared(
    worlds, vision, concept
):
    report = run(vision, worlds.clip("sd1"), concept).report
    lines = report.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["plain", "100", "200", "300"]
    assert "chosen" in lines[3]
    assert "with the pictures the superclass draws" in report
    assert "of equal ones the earliest" in report


@pytest.mark.parametrize(("family", "name", "width"), [("sd1", "l", 768), ("sdxl", "g", 1280)])
def test_a_text_encoder_that_shares_the_vision_models_space_reads_the_prompts(
    worlds, family, name, width
):
    vision, clip = build_vision(worlds, width=width), worlds.new_clip(family)
    targets = fit_projection(vision, clip, name)
    chosen = run(vision, clip, worlds.concept("sd1"))
    assert f"the text encoder clip_{name}" in chosen.report
    assert chosen.best.step == 200
    expected = cosines(embed(vision, RIGHT), targets).mean()
    assert chosen.scores[1].prompt == pytest.approx(float(expected), abs=1e-3)


def test_a_projection_no_checkpoint_filled_is_not_used(worlds, vision, concept):
    clip = worlds.new_clip("sd1")
    with torch.no_grad():
        clip.cond_stage_model.clip_l.transformer.text_projection.weight.zero_()
    chosen = run(vision, clip, concept)
    assert "with the pictures the superclass draws" in chosen.report
    assert chosen.scores == run(vision, worlds.clip("sd1"), concept).scores


def test_a_text_encoder_gives_the_same_conditioning_after_it_was_asked(worlds, concept):
    vision, clip = build_vision(worlds), worlds.new_clip("sd1")
    fit_projection(vision, clip, "l")
    (before, more), *_ = worlds.encode(clip, "a cat")
    assert "clip_l" in run(vision, clip, concept).report
    (after, less), *_ = worlds.encode(clip, "a cat")
    assert torch.equal(before, after)
    assert torch.equal(more["pooled_output"], less["pooled_output"])


def test_a_vision_model_of_another_width_or_kind_compares_pictures(worlds, concept):
    clip = worlds.clip("sd1")
    for vision in (build_vision(worlds, width=640), build_vision(worlds, "siglip_vision_model")):
        chosen = run(vision, clip, concept)
        assert "with the pictures the superclass draws" in chosen.report
        assert chosen.best.step == 200


def test_a_single_checkpoint_is_kept_and_pictures_of_any_size_are_taken(worlds, vision, concept):
    large = torch.rand(2, 48, 80, 3, generator=torch.Generator().manual_seed(1))
    images = [torch.rand(40, 20, 4), torch.rand(2, 33, 64, 3)]
    chosen = run(
        vision,
        worlds.clip("sd1"),
        concept,
        checkpoints=[Checkpoint(7, concept, large)],
        images=images,
        plain=large,
    )
    assert chosen.best.step == 7
    assert chosen.scores[0].prompt == pytest.approx(1.0)


def test_a_prompt_of_any_length_is_read(worlds, concept):
    vision, clip = build_vision(worlds), worlds.new_clip("sd1")
    fit_projection(vision, clip, "l")
    prompts = [PROMPTS[0], "a <thing> " + "very " * 200 + "far away"]
    assert "clip_l" in run(vision, clip, concept, prompts=prompts).report


def test_pictures_of_nan_are_named(worlds, vision, concept):
    broken = RIGHT.clone()
    broken[1, 4, 4] = torch.nan
    for changes, name in (
        ({"checkpoints": [Checkpoint(200, concept, broken)]}, "the pictures of step 200"),
        ({"plain": broken}, "the superclass's pictures"),
        ({"images": [broken]}, "the training pictures"),
    ):
        with pytest.raises(ValueError, match=f"made NaN or infinity of {name}"):
            run(vision, worlds.clip("sd1"), concept, **changes)


def test_what_does_not_match_the_prompts_is_refused(worlds, vision, concept):
    clip = worlds.clip("sd1")
    with pytest.raises(ValueError, match="at least one checkpoint"):
        run(vision, clip, concept, checkpoints=[])
    with pytest.raises(ValueError, match=r"3 prompts of the checkpoint of step 100, found \(2, "):
        run(vision, clip, concept, prompts=[*PROMPTS, "a <thing>"])
    with pytest.raises(ValueError, match="2 prompts of the plain superclass"):
        run(vision, clip, concept, plain=PLAIN[:1])
    with pytest.raises(ValueError, match="found two of step 100"):
        run(vision, clip, concept, checkpoints=[Checkpoint(100, concept, RIGHT)] * 2)
    with pytest.raises(ValueError, match="at least one training picture"):
        run(vision, clip, concept, images=[])


def test_choosing_can_be_interrupted(worlds, vision, concept):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(vision, worlds.clip("sd1"), concept)
