"""Training gives the same bits with any threads, and waits for a device no more than it must."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from perfusion.training.denoiser import Conditioning
from perfusion.training.run import train_concept
from tests.method.tiny_diffusion import assert_identical, config


@pytest.fixture
def four_threads():
    """Several threads, however few cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("chosen", [[0, 1, 0, 0], [2, 2, 2, 2, 1, 0, 2, 2, 1, 1, 2, 0]])
def test_a_prompt_that_is_drawn_twice_gets_the_same_gradient_every_time(chosen):
    random = torch.Generator().manual_seed(0)
    encodings = torch.randn(3, 77, 256, generator=random)
    mask = torch.ones(3, 77, dtype=torch.bool)
    weights = torch.randn(len(chosen), 77, 256, generator=random)
    # In the order in which they stand in the batch.
    expected = torch.zeros_like(encodings)
    for row, at in enumerate(chosen):
        expected[at] += weights[row]
    for _ in range(50):
        encodings.grad = None
        found = Conditioning(encodings.requires_grad_(), mask).rows(torch.tensor(chosen))
        (found.encodings * weights).sum().backward()
        assert encodings.grad is not None
        assert torch.equal(encodings.grad, expected)


def test_chosen_rows_are_those_that_indexing_gives():
    encodings, mask = torch.rand(3, 7, 5), torch.rand(3, 7) > 0.5
    chosen = torch.tensor([2, 0, 2])
    found = Conditioning(encodings, mask, extra=encodings[:, 0]).rows(chosen)
    assert found.extra is not None
    assert torch.equal(found.encodings, encodings[chosen])
    assert torch.equal(found.mask, mask[chosen])
    assert torch.equal(found.extra, encodings[chosen, 0])


@pytest.mark.usefixtures("four_threads")
def test_a_training_with_several_threads_ends_in_the_same_bits_every_time(denoiser, covariance):
    settings = config(steps=20, batch_size=12)
    first = train_concept(denoiser, settings, covariance)
    for _ in range(4):
        assert_identical(train_concept(denoiser, settings, covariance), first)


class OnDevice(torch.Tensor):
    """A tensor as on another device: what is computed from it is there too, reading it counts."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in READING or (func.__name__ == "to" and "cpu" in map(str, args)):
            cls.reads += 1
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args, **(kwargs or {}))
                return found.as_subclass(torch.Tensor) if isinstance(found, cls) else found
        return super().__torch_function__(func, types, args, kwargs)


READING = ("cpu", "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero")


def on_device(denoiser, monkeypatch):
    """The denoiser with all it computes on another device, its masks of tokens on the CPU."""
    encode, superclass = denoiser.encode, denoiser.encode_superclass
    project, errors, initial = denoiser.project, denoiser.errors, denoiser.initial_embeddings

    def moved(encoded):
        return replace(encoded, encodings=encoded.encodings.as_subclass(OnDevice))

    changes = {
        "encode": lambda *args: moved(encode(*args)),
        "encode_superclass": lambda *args: moved(superclass(*args)),
        "project": lambda *args: project(*args).as_subclass(OnDevice),
        "errors": lambda *args: errors(*args).as_subclass(OnDevice),
        "initial_embeddings": lambda: {k: v.as_subclass(OnDevice) for k, v in initial().items()},
    }
    for name, change in changes.items():
        monkeypatch.setattr(denoiser, name, change)
    return denoiser


@pytest.mark.parametrize("rows_at_once", [0, 1])
def test_a_step_reads_from_the_device_twice_in_however_many_parts(
    rows_at_once, denoiser, covariance, monkeypatch
):
    """Once the concept's encoding, which the next direction needs, and once how the step went."""
    remote = on_device(denoiser, monkeypatch)
    counts = []
    for steps in (2, 5):
        OnDevice.reads = 0
        train_concept(remote, config(steps=steps, rows_at_once=rows_at_once), covariance)
        counts.append(OnDevice.reads)
    assert counts[1] - counts[0] == 3 * 2


def test_reading_is_noticed():
    OnDevice.reads = 0
    tensor = torch.rand(3).as_subclass(OnDevice)
    assert isinstance(tensor.sum() + 1, OnDevice)
    assert OnDevice.reads == 0
    assert bool(torch.isfinite(tensor).all())
    assert type(tensor.to("cpu", torch.float64)) is torch.Tensor
    tensor.tolist()
    assert OnDevice.reads == 3
