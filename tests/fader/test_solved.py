"""The solved critic: separations against closed forms, gradients that bring means together, sums over ranks."""

from __future__ import annotations

import math

import pytest
import torch

from fader.adversaries.solved import FisherCritic
from fader.attributes import Attribute, Attributes
from fader.method import identity
from tests.fader.tiny import two_groups

MALE = Attributes([Attribute("Male")])
MANY = 20_000


def drawn(share: float, apart: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return two_groups(MANY, share, apart, seed)


def seen(latent: torch.Tensor, labels: torch.Tensor, attributes: Attributes = MALE, **settings) -> FisherCritic:
    critic = FisherCritic(attributes, latent.shape[1], **{"half_life": 10**9, "shrinkage": 1e-9, **settings})
    critic.observe(attributes, latent, labels, identity)
    return critic


def estimates(critic: FisherCritic, latent: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return critic.estimates(critic.solve(), MALE, latent, labels)


@pytest.mark.parametrize("share", [0.5, 0.05])
@pytest.mark.parametrize("apart", [0.0, 1.0, 3.0])
def test_the_separation_of_two_gaussians_is_the_closed_form_whatever_their_scale(share, apart):
    """(d/2)² over the variance of all, 1 + p (1 - p) d²: a quarter of the squared distance of the means."""
    separation = seen(*drawn(share, apart)).solve().separations.item()
    assert separation == pytest.approx(apart**2 / 4 / (1 + share * (1 - share) * apart**2), rel=0.1, abs=2e-3)


def test_the_estimate_of_a_batch_is_unbiased_and_its_gradient_brings_the_means_together():
    latent, labels = drawn(0.2, 1.0)
    critic = seen(latent, labels)
    separation = critic.solve().separations.item()
    other, other_labels = drawn(0.2, 1.0, seed=1)
    assert estimates(critic, other, other_labels).mean().item() == pytest.approx(separation, rel=0.1)
    moved = latent.clone().requires_grad_()
    estimates(critic, moved, labels).mean().backward()
    (gradient,) = moved.grad[:, 1:2].unbind(1)
    present = labels[:, 0] == 1
    assert (gradient[present] > 0).all() and (gradient[~present] < 0).all()
    step = 0.01 * separation / moved.grad.square().sum()
    after = seen(latent - step * moved.grad, labels).solve().separations.item()
    assert 0.9 * separation < after < separation


def test_a_k_way_attribute_weighs_its_values_alike_and_a_continuous_one_is_told_by_correlation():
    hair = Attributes([Attribute("Hair", "k-way", ("black", "blond", "brown"))])
    chance = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), MANY, True, generator=chance)[:, None].float()
    means = torch.tensor([-1.0, 0.0, 1.0])[labels[:, 0].long()]
    latent = (means + 3 * torch.randn(MANY, generator=chance))[:, None]
    want = (2 / 3) / latent.var().item()
    assert seen(latent, labels, hair).solve().separations.item() == pytest.approx(want, rel=0.2)
    age = Attributes([Attribute("Age", "continuous")])
    value = torch.rand(MANY, 1, generator=chance)
    noise = torch.randn(MANY, 1, generator=chance)
    assert seen(noise, value, age).solve().separations.item() < 1e-3
    assert seen(noise + 4 * value, value, age).solve().separations.item() > 0.05


def test_random_features_show_what_no_linear_reader_sees():
    """A label that says whether a latent lies far out, on either side."""
    latent = torch.randn(MANY, 3, generator=torch.Generator().manual_seed(0))
    labels = (latent[:, 1:2].abs() > 1).float()
    assert seen(latent, labels).solve().separations.item() < 1e-3
    critic = seen(latent, labels, num_hidden=32)
    for _ in range(2):  # the first batch does not know its own middle
        critic.observe(MALE, latent, labels, identity)
    assert critic.solve().separations.item() > 0.2
    same = FisherCritic(MALE, 3, 100, num_hidden=32)
    assert torch.equal(same.projection, critic.projection), "every rank has the same features"


def test_unknown_labels_count_nowhere_and_values_never_seen_are_no_news():
    latent, labels = drawn(0.3, 2.0)
    some = labels.clone()
    some[::2] = -1
    half = seen(latent, some).solve().separations.item()
    assert half == pytest.approx(seen(latent, labels).solve().separations.item(), rel=0.1)
    critic = seen(latent, torch.ones_like(labels))
    assert critic.solve().separations.item() == 0
    assert not estimates(critic, latent, labels).any()
    fresh = FisherCritic(MALE, 3, 100)
    assert not estimates(fresh, latent, labels).any()


def test_old_latents_fade():
    """After one half-life of latents that tell nothing a third of what is remembered tells, after many nothing does."""
    latent, labels = drawn(0.5, 3.0)
    still, _ = drawn(0.5, 0.0, seed=2)
    critic = seen(latent, labels, half_life=MANY)
    first = critic.solve().separations.item()
    critic.observe(MALE, still, labels, identity)
    second = critic.solve().separations.item()
    for _ in range(20):
        critic.observe(MALE, still, labels, identity)
    assert first > 2 * second > 20 * critic.solve().separations.item()


def test_two_ranks_know_what_one_process_knows():
    latent, labels = drawn(0.3, 1.0)
    whole = seen(latent, labels)
    halves = [(latent[:8000], labels[:8000]), (latent[8000:], labels[8000:])]
    sums = []
    for part in halves:  # what each rank gives to the sum
        FisherCritic(MALE, 3, 10**9).observe(MALE, *part, lambda x: (sums.append(x), x)[1])
    rank = FisherCritic(MALE, 3, 10**9, shrinkage=1e-9)
    rank.observe(MALE, *halves[0], lambda x: sums[0] + sums[1])
    assert torch.allclose(rank.solve().directions, whole.solve().directions, rtol=1e-9)
    parts = [estimates(whole, *part).sum() for part in halves]
    assert (sum(parts) / MANY).item() == pytest.approx(estimates(whole, latent, labels).mean().item(), rel=1e-4)


def test_autocast_leaves_it_alone():
    latent, labels = drawn(0.3, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        critic = seen(latent, labels, num_hidden=8)
        found = estimates(critic, latent, labels)
    assert torch.equal(found, estimates(seen(latent, labels, num_hidden=8), latent, labels))


def test_what_is_not_finite_is_left_out_and_nothing_that_was_known_is_lost():
    """Also in a phase that trains nothing, of which the engine undoes nothing."""
    latent, labels = drawn(0.5, 1.0)
    critic = seen(latent, labels)
    before = estimates(critic, latent, labels)
    for wrong in (math.nan, math.inf):
        damaged = latent.clone()
        damaged[0, 0] = wrong
        critic.observe(MALE, damaged, labels, identity)
        assert torch.equal(estimates(critic, latent, labels), before)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="too many for their covariance"):
        FisherCritic(MALE, 8192, 100)
    with pytest.raises(ValueError, match="must be positive"):
        FisherCritic(MALE, 8, 0)
