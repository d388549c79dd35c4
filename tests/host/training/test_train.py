"""Training as the node does it: what is shown, what comes in, what runs out."""

from __future__ import annotations

import logging

import comfy.sample
import comfy.utils
import pytest
import torch
from comfyui_perfusion.demo.model.small_autoencoder import DOWNSCALE, LATENT_CHANNELS
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.text.text_encoders import TextEncoders
from comfyui_perfusion.host.training.options import TrainingOptions
from comfyui_perfusion.host.training.view import TrainingView
from comfyui_perfusion.nodes.training_options import PerfusionTrainingOptions
from comfyui_perfusion.perfusion import save_concept

from tests.host.small_training import (
    STEPS,
    SmallTraining,
    Tripwire,
    run_folder,
    use_folder,
)
from tests.host.training.test_selection import build_vision

PROMPTS = ("a {} on the beach", "a <bo> in the snow")
SIDE = 64
SEED = 3


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        yield SmallTraining(patch)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    use_folder(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture
def told(monkeypatch):
    """What the progress bar was told: (step, steps, preview)."""
    found = []
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda value, total, preview, node_id=None: found.append((value, total, preview)),
    )
    return found


@pytest.fixture
def watching(monkeypatch):
    """Starts a `Tripwire` that ends with the test."""
    started = []

    def start(at):
        started.append(Tripwire(monkeypatch, at))

    yield start
    for each in started:
        each.remove()


def file_of(concept, folder):
    """The bytes of a concept's file."""
    return save_concept(concept, folder / "concept.safetensors", torch.float32).read_bytes()


def drawn_by_hand(small, concept, prompt):
    """What Apply Concepts, CLIPTextEncode, KSampler and VAE Decode make of a prompt."""
    with torch.inference_mode():
        model, clip = apply_concepts(small.model, small.clip, [concept])
        conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")]
        empty = torch.zeros(1, LATENT_CHANNELS, SIDE // DOWNSCALE, SIDE // DOWNSCALE)
        noise = comfy.sample.prepare_noise(empty, SEED)
        latent = comfy.sample.sample(
            *(model, noise, 2, 4.0, "euler", "normal", *conds, empty), disable_pbar=True, seed=SEED
        )
        return small.vae.decode(latent)[0]


def test_samples_are_shown_live_and_are_what_a_user_will_draw(small, folder, told):
    trained = small.run(
        sample_prompts=PROMPTS, sample_steps=2, sample_cfg=4.0, sample_seed=SEED, sample_every=2
    )
    rows, columns = len(PROMPTS), 3  # steps 0, 2 and 4
    assert trained.samples.shape == (1, rows * SIDE, columns * SIDE, 3)
    previews = [(value, *preview) for value, total, preview in told if preview is not None]
    assert [each[:2] for each in previews] == [(0, "JPEG"), (2, "JPEG"), (4, "JPEG")]
    assert previews[0][2].size == (rows * SIDE, SIDE)
    last = trained.samples[0, :, -SIDE:]
    for row, prompt in enumerate(("a <bo> on the beach", "a <bo> in the snow")):
        expected = (drawn_by_hand(small, trained.concept, prompt) * 255).round() / 255
        assert torch.equal(last[row * SIDE : (row + 1) * SIDE], expected)
    assert not torch.equal(trained.samples[0, :, :SIDE], last)


def test_samples_checkpoints_and_concepts_on_the_model_do_not_change_what_is_learned(small, folder):
    plain = small.run(sample_every=0, checkpoint_every=0)
    assert plain.samples.shape[0] == 1
    watched = small.run(sample_every=1, checkpoint_every=1)
    assert file_of(plain.concept, folder) == file_of(watched.concept, folder)
    name = next(iter(plain.concept.o_v))
    assert not torch.equal(plain.concept.o_v[name], small.run({"seed": 1}).concept.o_v[name])


def test_the_report_says_what_became_of_the_loss_and_of_the_pictures(small, folder):
    report = small.run({"steps": 12, "batch_size": 8}).report
    assert report.startswith("12 steps, loss ")
    first, last = small.run({"steps": 12, "batch_size": 8}).result.record.ends()[0]
    assert f"(from little noise to much: {first:.3g} to {last:.3g}, " in report
    assert "\n2 pictures of 64x64: as they are\n" in report
    assert small.run({"steps": 1}).report.splitlines()[0].startswith("1 steps, loss")


def test_the_loss_map_is_the_smoothed_loss_and_the_csv_has_a_line_for_each_step(small, folder):
    concept, losses, samples, csv, report = small.run_node().args
    lines = csv.splitlines()
    assert len(lines) == 1 + STEPS
    smoothed = [float(line.split(",")[2]) for line in lines[1:]]
    assert losses["loss"] == pytest.approx(smoothed, rel=1e-4)
    assert (run_folder(folder) / "losses.csv").read_text() == csv
    assert concept.metadata["images_hash"]
    assert samples.ndim == 4
    assert f"{STEPS} steps" in report
    assert "training needs about" in report


def test_the_memory_that_is_expected_is_said_before_training(small, folder, told, caplog):
    with caplog.at_level(logging.INFO, "perfusion"):
        small.run(sample_every=0)
    assert "training needs about" in caplog.text


def test_a_list_of_pictures_is_trained_on_as_their_batch_is(small, folder):
    batch = small.run_node().args[0]
    one_by_one = small.run_node(
        images=[picture[None] for picture in small.images], mask=list(small.masks)
    ).args[0]
    assert file_of(batch, folder) == file_of(one_by_one, folder)


def test_pictures_of_different_sizes_and_their_captions_are_trained_on(small, folder):
    wide = torch.rand(1, SIDE, 2 * SIDE, 3, generator=torch.Generator().manual_seed(0))
    images = [small.images[:1], wide]
    texts = ["a photo of a <bo> in the snow", "a <bo> at night"]
    as_list = small.run_node(images=images, mask=None, captions=texts).args[0]
    as_lines = small.run_node(images=images, mask=None, captions=["\n".join(texts)]).args[0]
    without = small.run_node(images=images, mask=None).args[0]
    assert file_of(as_list, folder) == file_of(as_lines, folder) != file_of(without, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": [torch.ones(3, SIDE, SIDE)]}, "a mask for each of the 2 images"),
        (
            {"images": [torch.rand(2, 72, 72, 3)], "mask": [torch.zeros(2, 72, 72)]},
            "the mask of image 0 is empty",
        ),
        ({"mask": [torch.ones(2, SIDE, 40)]}, "expected a mask of 64x64 for image 0"),
        ({"captions": ["a <bo>"]}, "one for each of the 2 images, found 1"),
        ({"captions": ["a <bo>", "a teddy"]}, "caption 2: expected the placeholder <bo>"),
        ({"captions": ["a <bo>", ""]}, "caption 2: expected the placeholder <bo>"),
        ({"options": [TrainingOptions(sample_prompts=("a teddy",))]}, "sample prompt 1"),
        ({"steps": [2, 3]}, "steps: expected one value, found a list of 2"),
        (
            {"clip_vision": [object()], "options": [TrainingOptions(sample_every=0)]},
            "clip_vision: expected samples",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_said_before_any_work(
    small, folder, monkeypatch, changes, message
):
    def work(*_):
        pytest.fail("worked before it was checked")

    monkeypatch.setattr("comfyui_perfusion.host.training.train.covariance_of", work)
    monkeypatch.setattr(small.vae, "encode", work)
    with pytest.raises(ValueError, match=message):
        small.run_node(covariance=None, **changes)
    assert not (folder / "runs").exists()


def test_locks_that_change_something_at_every_token_count_every_token(small, folder, monkeypatch):
    counted = []

    def found(clip, source, on_progress, positions, model):
        counted.append(positions)
        return small.covariance

    monkeypatch.setattr("comfyui_perfusion.host.training.train.covariance_of", found)
    for lock in ("local", "twin"):
        small.run_node(covariance=None, key_lock=[lock])
    assert counted == ["all", "words"]


def limit(monkeypatch, most):
    """Let the device have no room for more than so many pictures at once."""
    errors = TrainingView.errors

    def limited(self, batch, *rest):
        found = errors(self, batch, *rest)
        if len(batch.indices) > most:
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(TrainingView, "errors", limited)


def test_a_step_that_does_not_fit_into_memory_is_done_in_parts(small, folder, caplog, monkeypatch):
    whole = small.run({"batch_size": 4}, sample_every=0)
    limit(monkeypatch, most=2)
    with caplog.at_level(logging.INFO, "perfusion"):
        parts = small.run({"batch_size": 4}, sample_every=0, resume="never")
    assert "going on with at most 2 pictures at once" in caplog.text
    for name, values in whole.concept.o_v.items():
        torch.testing.assert_close(parts.concept.o_v[name], values, rtol=1e-3, atol=1e-4)


def test_when_not_even_one_picture_fits_the_message_says_what_helps(small, folder, monkeypatch):
    limit(monkeypatch, most=0)
    message = "training needs about .*gradient checkpointing.*nothing was learned yet"
    with pytest.raises(MemoryError, match=message):
        small.run(sample_every=0)
    assert small.is_untouched()


def test_memory_that_runs_out_later_loses_no_step(small, folder, monkeypatch):
    whole = small.run(sample_every=0, checkpoint_every=0)
    with monkeypatch.context() as patch:
        seen = []
        errors = TrainingView.errors

        def worse(self, *args):
            seen.append(args)
            if len(seen) > 2:
                raise torch.OutOfMemoryError
            return errors(self, *args)

        patch.setattr(TrainingView, "errors", worse)
        with pytest.raises(MemoryError, match=r"2 steps learned is in .*step_00002"):
            small.run(sample_every=0, checkpoint_every=0, resume="never")
    went_on = small.run(sample_every=0, checkpoint_every=0)
    assert "continued from step 2" in went_on.report
    assert file_of(went_on.concept, folder) == file_of(whole.concept, folder)


def test_samples_for_which_memory_does_not_suffice_do_not_end_the_training(
    small, folder, watching, caplog
):
    def full(place):
        if place == "sample":
            raise torch.OutOfMemoryError

    watching(full)
    trained = small.run()
    assert trained.result.steps == STEPS
    assert "not enough memory to draw samples" in caplog.text
    assert small.is_untouched()


def test_with_a_vision_model_the_best_sample_is_returned_and_all_are_reported(
    small, worlds, folder
):
    last = small.run(sample_every=1, resume="never")
    scored = small.run(clip_vision=build_vision(worlds), sample_every=1, resume="never")
    best = next(line for line in scored.report.splitlines() if line.startswith("chosen: step "))
    step = int(best.removeprefix("chosen: step "))
    assert 1 <= step <= STEPS
    kept = (run_folder(folder) / f"step_{step:05}.safetensors").read_bytes()
    assert file_of(scored.concept, folder) == kept
    assert "plain" in scored.report
    assert torch.equal(scored.samples, last.samples)


def test_what_was_sampled_before_a_run_was_cut_off_is_scored_too(small, worlds, folder):
    vision = build_vision(worlds)
    whole = small.run(clip_vision=vision, sample_every=1, checkpoint_every=0)
    small.run({"steps": 2}, sample_every=1, checkpoint_every=0, resume="never")
    longer = small.run(clip_vision=vision, sample_every=1, checkpoint_every=0, resume="always")
    assert "continued from step 2" in longer.report
    assert torch.equal(longer.samples, whole.samples)
    assert file_of(longer.concept, folder) == file_of(whole.concept, folder)


def test_samples_of_an_earlier_run_with_other_prompts_are_drawn_again(small, folder):
    other = ("a photo of a {} in space",)
    whole = small.run(sample_prompts=other)
    small.run({"steps": 2}, resume="never")
    longer = small.run(sample_prompts=other, resume="always")
    # Of step 0 there is no concept to draw with.
    assert torch.equal(longer.samples, whole.samples[:, :, SIDE:])


def test_the_options_node_starts_with_the_defaults_and_hides_what_few_people_need():
    assert PerfusionTrainingOptions.execute().args[0] == TrainingOptions()
    inputs = {each.id: each for each in PerfusionTrainingOptions.GET_SCHEMA().inputs}
    shown = {each.id: each.default for each in inputs.values() if hasattr(each, "default")}
    assert PerfusionTrainingOptions.execute(**shown).args[0] == TrainingOptions()
    assert {name for name, each in inputs.items() if not each.advanced} == {
        *("sample_every", "sample_prompts", "checkpoint_every", "resume"),
        *("precision", "gradient_checkpointing", "resolution", "flip"),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp8"}, "precision: expected one of auto, fp32, bf16, fp16"),
        ({"resume": "perhaps"}, "resume: expected one of unfinished, always, never"),
        ({"templates": "a photo of a thing"}, "exactly one {}"),
        ({"crop": 0.2}, "variants: expected at least 2"),
        ({"mask_background": 1.5}, "background: expected 0 to 1"),
        ({"sample_steps": 0}, "sample_steps: expected at least 1"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_where_it_is_set(changes, message):
    with pytest.raises(ValueError, match=message):
        PerfusionTrainingOptions.execute(**changes)


def test_a_training_that_is_cut_off_while_samples_are_scored_is_not_done_again(
    small, worlds, folder, monkeypatch
):
    vision = build_vision(worlds)
    monkeypatch.setattr(vision, "encode_image", lambda *_: pytest.fail("cut off here"))
    with pytest.raises(pytest.fail.Exception):
        small.run(clip_vision=vision)
    monkeypatch.undo()
    use_folder(monkeypatch, folder)
    again = small.run(clip_vision=build_vision(worlds))
    assert f"continued from step {STEPS}" in again.report
    assert "chosen: step" in again.report


def test_a_prompt_may_write_the_placeholder_in_another_case():
    options = TrainingOptions(sample_prompts=("A <Bo> and {}",))
    assert options.prompts_for("<bo>") == ("A <bo> and <bo>",)


def test_what_memory_left_in_a_projection_no_file_fills_does_not_rename_an_encoder(worlds):
    clip = worlds.new_clip("sd1")
    name = TextEncoders(clip).digest()
    projection = clip.cond_stage_model.clip_l.transformer.text_projection
    with torch.no_grad():
        projection.weight.fill_(torch.nan)
    assert TextEncoders(clip).digest() == name
