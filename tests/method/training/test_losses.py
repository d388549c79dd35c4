"""The masked loss: weighted once, normalised by its weights."""

from __future__ import annotations

import pytest
import torch

from perfusion.training.losses import masked_mean


def test_without_masks_it_is_the_plain_mean():
    errors = torch.rand(3, 4, 5, 6)
    torch.testing.assert_close(masked_mean(errors, None), errors.mean())


def test_the_mask_weighs_once_and_not_squared():
    errors = torch.tensor([1.0, 5.0]).reshape(1, 1, 1, 2).repeat(1, 3, 1, 1)
    masks = torch.tensor([2.0, 1.0]).reshape(1, 1, 1, 2)
    # weights 1 and 1/2: (1 * 1 + 5 * 1/2) / 1.5, while squared weights would give 2.25 / 1.25
    torch.testing.assert_close(masked_mean(errors, masks), torch.tensor(3.5 / 1.5))


def test_a_small_subject_counts_as_much_as_a_large_one():
    errors = torch.ones(2, 1, 4, 4) * torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    masks = torch.zeros(2, 1, 4, 4)
    masks[0] = 1
    masks[1, 0, 0, 0] = 0.1
    torch.testing.assert_close(masked_mean(errors, masks), torch.tensor(2.0))


def test_the_background_keeps_its_floor():
    errors = torch.tensor([2.0, 10.0]).reshape(1, 1, 1, 2)
    masks = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    assert float(masked_mean(errors, masks)) == 2.0
    torch.testing.assert_close(masked_mean(errors, masks, 0.25), torch.tensor(4.5 / 1.25))
    torch.testing.assert_close(masked_mean(errors, masks, 1.0), errors.mean())


def test_masks_of_another_size_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\).*found \(2, 1, 8, 8\)"):
        masked_mean(torch.ones(2, 3, 4, 4), torch.ones(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\(B, C, h, w\), found \(2, 3\)"):
        masked_mean(torch.ones(2, 3), None)
