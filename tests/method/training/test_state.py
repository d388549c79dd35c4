"""The file of a run between two steps."""

from __future__ import annotations

import pytest
import torch

from perfusion.files.safe_file import FileFormatError, write_atomically
from perfusion.training.state import TrainingState, load_state, save_state

TENSORS = {
    "i": torch.rand(5, dtype=torch.float64),
    "random": torch.arange(9, dtype=torch.uint8),
    "losses": torch.rand(3, 2),
}


def test_a_state_comes_back_as_it_was(tmp_path):
    state = TrainingState("abc", 3, TENSORS, 2.0**15, 7)
    save_state(state, tmp_path / "state.safetensors")
    found = load_state(tmp_path / "state.safetensors")
    assert (found.fingerprint, found.step, found.scale, found.since_scaled) == ("abc", 3, 2**15, 7)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perfusion_training": "2"}, "perfusion_training: expected a training state"),
        ({"step": "-1"}, "step: expected a number of at least 0, found -1"),
        ({"step": "2.5"}, "step: expected a number of at least 0"),
        ({"scale": "inf"}, "scale: expected a number"),
        ({"scale": "many"}, "scale: expected a number"),
        ({"since_scaled": ""}, "since_scaled: expected a number"),
    ],
)
def test_a_damaged_state_is_refused_by_the_part_that_is_wrong(change, message, tmp_path):
    good = {"perfusion_training": "1", "step": "3", "scale": "1.0", "since_scaled": "0"}
    write_atomically(tmp_path / "state.safetensors", TENSORS, good | change)
    with pytest.raises(FileFormatError, match=message):
        load_state(tmp_path / "state.safetensors")
