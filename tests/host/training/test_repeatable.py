"""The same training ends in the same bits, and torch's settings are what they were."""

from __future__ import annotations

import pytest
import torch
import torch.utils.deterministic
from comfyui_perfusion.host.training.repeatable import repeatable
from comfyui_perfusion.perfusion import Covariance, TrainingConfig, train_concept

from tests.host.training_world import view_of


def settings():
    """What decides whether torch sums in a fixed order."""
    return (
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )


def interrupted():
    """A training on a GPU that is cancelled."""
    with repeatable(torch.device("cuda:0")):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cudnn.benchmark
        raise KeyboardInterrupt


@pytest.mark.parametrize("benchmark", [False, True])
def test_a_gpu_is_asked_for_a_fixed_order_only_while_it_trains(benchmark):
    kept = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = benchmark
    try:
        before = settings()
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert settings() == before
        with repeatable(torch.device("cpu")):
            assert settings() == before
    finally:
        torch.backends.cudnn.benchmark = kept


def test_a_batch_with_one_prompt_many_times_trains_to_the_same_bits_with_several_threads(worlds):
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    world = worlds.new_model("sd1_light"), worlds.clip("sd1"), worlds.vae(), images
    # One sentence for all rows: its encoding's gradient is a sum over eight.
    config = TrainingConfig("<thing>", "mug", 3, 8, 0.03, 0.006, templates=("a photo of a {}",))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = []
        for _ in range(3):
            with view_of(world, superclass="mug") as view:
                identity = torch.eye(768, dtype=torch.float64)
                covariance = Covariance(identity, 1, 1, "words", view.encoder_hash)
                found.append(train_concept(view, config, covariance).state.tensors)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())
