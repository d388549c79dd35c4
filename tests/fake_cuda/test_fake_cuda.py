"""Everything that runs on a GPU, with one that is not there: devices agree, and the host's waits.

A wait is where the host needs a value of the device and stands still until it has it. `WAITS` is
what the code does today; a smaller number is an improvement to be written down here, a larger one
needs a reason.
"""

from __future__ import annotations

from collections import Counter

import comfy.model_patcher
import comfy.sd
import pytest
import torch
from comfy.supported_models_base import ClipTarget
from comfyui_perfusion.host.closed_form.edits import edit_assumption
from comfyui_perfusion.host.closed_form.weight_patches import EditSettings
from comfyui_perfusion.host.injection import injection
from comfyui_perfusion.host.injection.apply import apply_concepts
from comfyui_perfusion.host.pictures.auto_mask import AutoMaskOptions, auto_mask
from comfyui_perfusion.host.pictures.training_images import encode_images
from comfyui_perfusion.host.text.covariance import BATCH, measure_covariance
from comfyui_perfusion.host.training.view import training_view
from comfyui_perfusion.nodes.schedule import PerfusionScheduleGate
from comfyui_perfusion.perfusion import Direction, gated_inputs
from comfyui_perfusion.perfusion.gated.gate import Gate
from comfyui_perfusion.perfusion.gated.rank_one import GatedProjections

from tests.fake_cuda.device import CUDA, ELSEWHERE, FakeGpu
from tests.host.conftest import SMALL_TEXT, TEXT
from tests.host.training_world import batch_of

FAMILY = "small"
# Where the host waits -> at most how often for one more unit of the work.
WAITS = {
    "model call, local": {},
    "model call, global": {},
    "model call, twin": {},
    # Where in the schedule the call is: samplers also call between the steps they are given.
    "model call, scheduled": {("host/injection/injection.py:_moment", "_local_scalar_dense"): 1},
    "model call, in some blocks": {},
    "training step": {},
    "batch of captions": {},
    # Its map comes back to be made a mask.
    "picture to mask": {("host/pictures/auto_mask.py:_looks", "_to_copy"): 1},
    # Two weights, whose changes are kept on the CPU.
    "layer to edit": {("perfusion/closed_form/changes.py:changes_of", "_to_copy"): 2},
}


@pytest.fixture(scope="module")
def model(worlds):
    with FakeGpu():
        base = worlds.base_model(FAMILY, device="cuda:0")
    return comfy.model_patcher.ModelPatcher(base, load_device=CUDA, offload_device=CUDA)


@pytest.fixture(scope="module")
def clip():
    tokenizer, encoder = TEXT["sd1"]
    places = dict.fromkeys(("load_device", "offload_device", "initial_device"), CUDA)
    options = {"dtype": torch.float32, "clip_l_model_config": SMALL_TEXT, **places}
    with FakeGpu():
        return comfy.sd.CLIP(ClipTarget(tokenizer, encoder), model_options=options)


@pytest.fixture(scope="module")
def two(worlds):
    fitting = worlds.model(FAMILY), worlds.clip("sd1")
    return [worlds.fitting_concept(*fitting, *each) for each in enumerate(("<a>", "<b>"))]


def waits_of_one_more(work, few, more):
    """Where our code waits, by how often in each unit between `few` and `more`."""
    counted = []
    for amount in (few, more):
        with FakeGpu() as gpu:
            work(amount)
        counted.append(Counter({p: n for p, n in gpu.waits.items() if p[0] != ELSEWHERE}))
    return {p: n / (more - few) for p, n in (counted[1] - counted[0]).items()}


def assert_no_more_than(found, name):
    surplus = {place: n for place, n in found.items() if n > WAITS[name].get(place, 0)}
    assert not surplus, f"{name}: the host waits more often than written down: {surplus}"


@pytest.fixture
def sampling(worlds, model, two):
    """Waits of one more model call with concepts applied; its text encoder is on the CPU."""

    def count(lock, concepts=two):
        applied, words = apply_concepts(model, worlds.clip("sd1"), concepts, lock)
        positive, negative = worlds.encode(words, "a <a> and <b>"), worlds.encode(words, "")
        return waits_of_one_more(
            lambda steps: worlds.sample_conds(applied, positive, negative, steps), 2, 3
        )

    return count


@pytest.mark.parametrize("lock", ["local", "global", "twin"])
def test_concepts_are_applied_on_the_device(sampling, lock):
    assert_no_more_than(sampling(lock), f"model call, {lock}")


def test_a_schedule_runs_on_the_device(sampling, two):
    moving = 0.0, 0.8, 0.4, 0.6, 0.2, 0.3, ""
    concepts = [PerfusionScheduleGate.execute(concept, *moving).args[0] for concept in two]
    assert_no_more_than(sampling("local", concepts), "model call, scheduled")


def test_a_concept_in_some_blocks_all_the_time_runs_on_the_device(sampling, two):
    still = 0.0, 1.0, 0.5, 0.5, 0.2, 0.2, "down"
    concepts = [PerfusionScheduleGate.execute(concept, *still).args[0] for concept in two]
    assert_no_more_than(sampling("local", concepts), "model call, in some blocks")


def test_a_tensor_forgotten_on_the_cpu_is_caught(sampling, monkeypatch):
    def forgetful(linear, inputs, gates, outputs):
        return linear(inputs) + gates @ torch.zeros(outputs.shape)

    monkeypatch.setattr(injection, "project", forgetful)
    with pytest.raises(RuntimeError, match="two different devices"):
        sampling("local")


def test_a_wait_that_is_not_written_down_is_caught(sampling, monkeypatch):
    plain = injection.project

    def curious(linear, inputs, gates, outputs):
        return plain(linear, inputs, gates, outputs) * bool(gates.any())

    monkeypatch.setattr(injection, "project", curious)
    with pytest.raises(AssertionError, match="waits more often"):
        assert_no_more_than(sampling("local"), "model call, local")


def edit_on_device(view, encoded):
    """What is under training, as the learner makes it of an input it follows on the CPU."""
    followed = torch.ones(encoded.encodings.shape[-1], dtype=torch.float64)
    directions = [Direction(followed, followed, Gate(0.7, 0.2))]
    rows = {name: torch.ones(1, width, device=CUDA) for name, width in view.layers.items()}
    return GatedProjections(*gated_inputs(encoded.encodings, directions), rows, rows)


def test_a_training_step_runs_on_the_device(worlds, model, clip):
    pictures = encode_images(worlds.vae(), [torch.rand(2, 64, 64, 3)], None)

    def steps(count):
        with training_view(model, clip, pictures, "coffee mug", "<thing>") as view:
            for seed in range(count):
                encoded = view.encode(["a <thing>", "the <thing>"], view.initial_embeddings())
                edit = edit_on_device(view, encoded)
                errors = view.errors(batch_of(0, 1, seed=seed), encoded, edit)
                assert errors.device == CUDA

    assert_no_more_than(waits_of_one_more(steps, 1, 2), "training step")


def test_a_covariance_is_measured_on_the_device(clip):
    def measure(batches):
        found = measure_covariance(clip, ["a photo of a cat"] * (BATCH * batches))
        assert found.width == 768

    assert_no_more_than(waits_of_one_more(measure, 1, 2), "batch of captions")


def test_masks_are_found_on_the_device(worlds, model, clip):
    def mask(pictures):
        options = AutoMaskOptions(resolution=128)
        images = torch.rand(pictures, 128, 128, 3)
        found = auto_mask(model, clip, worlds.vae(), images, "cat", options)
        assert found.masks.shape == (pictures, 128, 128)

    assert_no_more_than(waits_of_one_more(mask, 1, 2), "picture to mask")


def test_weights_are_edited_on_the_device(worlds, model, monkeypatch):
    # An encoder without values could not tell the two prompts apart.
    clip = worlds.clip("sd1")
    monkeypatch.setattr("comfy.model_management.get_torch_device", lambda: CUDA)

    def edit(layers):
        names = ["input_blocks.1", "middle_block"][:layers]
        settings = EditSettings(ridge=0.1, layers=",".join(names))
        edit_assumption(model, clip, "a rose", "a blue rose", True, 0.0, False, settings, None)

    assert_no_more_than(waits_of_one_more(edit, 1, 2), "layer to edit")
