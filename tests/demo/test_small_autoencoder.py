"""The small world's decoder reads every pixel in the light of the whole picture."""

import torch

from inprocess import load_pack

load_pack()

from comfyui_perfusion.demo.model.small_autoencoder import (  # noqa: E402
    COLORS,
    SmallAutoencoder,
    color_prior,
)


def _likelihood(votes: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Mean log likelihood of pixels whose colours are drawn from ``shares``, up to a constant."""
    return (votes + shares.log()).logsumexp(-1).mean()


def test_the_prior_is_the_mixture_that_explains_the_votes_best() -> None:
    g = torch.Generator().manual_seed(0)
    wanted = torch.tensor([0.0, 0.9, 0.1])
    colors = torch.multinomial(wanted, 20_000, True, generator=g)
    # Evidence of known strength for the right colour: votes are its log likelihoods.
    means = 2.0 * torch.eye(3)
    seen = means[colors] + torch.randn(20_000, 3, generator=g)
    votes = (-0.5 * (seen[:, None] - means).square().sum(-1))[None]
    found = color_prior(votes).softmax(-1)
    assert found.shape == (1, 1, 3)
    uniform = torch.full((3,), 1 / 3)
    assert (found[0, 0] - wanted).abs().max() < 0.05
    assert _likelihood(votes, found) > _likelihood(votes, uniform) + 0.1
    assert _likelihood(votes, found) > _likelihood(votes, wanted.clamp(min=1e-3)) - 0.01


def test_a_pixel_in_doubt_follows_the_others_and_a_sure_one_stays() -> None:
    votes = torch.zeros(1, 4096, COLORS)
    votes[:, :, 5] = 9.0
    votes[:, 0, 7] = 9.5  # slightly rather 7 than 5
    votes[:, 1, 7] = 40.0  # certainly 7
    read = (votes + color_prior(votes)).argmax(-1)[0]
    assert votes.argmax(-1)[0, :2].tolist() == [7, 7]
    assert read[:2].tolist() == [5, 7]
    assert (read[2:] == 5).all()


def test_pictures_of_a_batch_do_not_change_each_other() -> None:
    torch.manual_seed(1)
    model = SmallAutoencoder().requires_grad_(False)
    z = torch.randn(3, 24, 8, 8)
    alone = torch.cat([model.votes(one[None]) for one in z])
    torch.testing.assert_close(model.votes(z), alone, atol=1e-4, rtol=1e-4)
