"""The solved critic: separations against the same discriminant in explicit features, gradients that bring values together."""

from __future__ import annotations

import math

import pytest
import torch

from fader.attributes import Attribute, Attributes
from fader.kernel_critic import KernelCritic
from fader.method import identity
from tests.fader.tiny import two_groups

MALE = Attributes([Attribute("Male")])
HAIR = Attributes([Attribute("Hair", "k-way", ("black", "blond", "brown")), Attribute("Male")])
MANY = 1_000


def drawn(share: float, apart: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return two_groups(MANY, share, apart, seed)


def seen(latent: torch.Tensor, labels: torch.Tensor, attributes: Attributes = MALE, **settings) -> KernelCritic:
    critic = KernelCritic(attributes, latent.shape[1], **{"num_records": len(latent), **settings}).to(latent.dtype).train()
    critic.observe(attributes, latent, labels, identity)
    critic.solve()
    return critic


def separation(*args, **settings) -> float:
    return seen(*args, **settings).separations[0].item()


def estimates(critic: KernelCritic, latent: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return critic.estimates(MALE, latent, labels)


@pytest.mark.parametrize("attributes", [MALE, HAIR], ids=["binary", "several"])
def test_it_is_the_discriminant_in_the_features_of_its_kernel(attributes):
    """Coordinates whose products are the kernel's, and Fisher's discriminant in them by means and covariance."""
    chance = torch.Generator().manual_seed(3)
    latent = torch.randn(120, 4, generator=chance, dtype=torch.float64) * torch.tensor([9.0, 1.0, 1.0, 0.2]) - 2
    labels = torch.stack([torch.randint(0, a.k, (120,), generator=chance) for a in attributes], 1).double()
    latent[:, 0] += 6 * labels[:, 0]
    critic = seen(latent, labels, attributes, ridge=1e-2)
    unit = (latent - latent.mean(0)) / latent.std(0, correction=0)
    values, vectors = torch.linalg.eigh((torch.cdist(unit, unit).square() / -8).exp())
    features = vectors * values.clamp(min=0).sqrt()
    covariance = features.T.cov(correction=0)
    covariance += 1e-2 * covariance.trace() * torch.eye(len(covariance))
    total = torch.zeros(120, dtype=torch.float64)
    for j, attribute in enumerate(attributes):
        means = torch.stack([features[labels[:, j] == value].mean(0) for value in range(attribute.k)])
        apart = means - means.mean(0)
        directions = torch.linalg.solve(covariance, apart.T)
        assert critic.separations[j].item() == pytest.approx((apart.T * directions).sum().item() / attribute.k, rel=1e-6)
        shares = labels[:, j].long().bincount() / 120
        reads = (features - features.mean(0)) @ directions / shares / attribute.k
        total += reads[torch.arange(120), labels[:, j].long()]
    assert torch.allclose(critic.estimates(attributes, latent, labels), total, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_the_farther_the_values_lie_the_larger_it_is_and_of_nothing_it_is_nearly_nothing(share):
    none, some, much = (separation(*drawn(share, apart), ridge=1e-2) for apart in (0.0, 1.0, 3.0))
    assert none < 0.3 * some < 0.15 * much
    assert none < 0.08


def test_the_estimate_of_other_records_tells_them_apart_and_its_gradient_brings_them_together():
    latent, labels = drawn(0.2, 2.0)
    critic = seen(latent, labels)
    known = critic.separations.item()
    other, other_labels = drawn(0.2, 2.0, seed=1)
    assert estimates(critic, other, other_labels).mean().item() == pytest.approx(known, rel=0.2)
    assert estimates(critic, other, 1 - other_labels).mean().item() < 0
    moved = other.clone().requires_grad_()
    estimates(critic, moved, other_labels).mean().backward()
    toward = -moved.grad * other.var(0)  # steepest where each number counts in its own deviations
    step = 0.1 * known / (toward * -moved.grad).sum()
    before, after = separation(other, other_labels), separation(other + step * toward, other_labels)
    assert 0.8 * before < after < 0.97 * before


def test_it_sees_what_no_linear_reader_sees():
    """A label that says whether a latent lies far out, on either side."""
    latent = torch.randn(MANY, 3, generator=torch.Generator().manual_seed(0))
    labels = (latent[:, 1:2].abs() > 1).float()
    assert separation(latent, labels) > 0.3
    shuffled = labels[torch.randperm(MANY, generator=torch.Generator().manual_seed(1))]
    assert separation(latent, shuffled) < 0.06


def test_a_smaller_ridge_reads_what_lies_in_directions_of_small_variance():
    chance = torch.Generator().manual_seed(0)
    labels = (torch.rand(MANY, 1, generator=chance) < 0.5).float()
    common = torch.randn(MANY, 1, generator=chance)
    latent = common + 0.1 * torch.randn(MANY, 6, generator=chance)
    latent[:, :1] += 0.2 * labels
    coarse, fine = (separation(latent, labels, ridge=ridge) for ridge in (1e-1, 1e-4))
    assert coarse < 0.05 and fine > 4 * coarse, (coarse, fine)


def test_a_continuous_attribute_counts_by_its_two_ends():
    age = Attributes([Attribute("Age", "continuous")])
    chance = torch.Generator().manual_seed(0)
    value, noise = torch.rand(MANY, 1, generator=chance), torch.randn(MANY, 1, generator=chance)
    assert separation(noise, value, age) < 0.02
    assert separation(noise + 4 * value, value, age) > 0.05


def test_unknown_labels_count_nowhere_and_values_never_seen_are_no_news():
    latent, labels = drawn(0.3, 2.0)
    some = labels.clone()
    some[::2] = -1
    assert separation(latent, some) == pytest.approx(separation(latent, labels), rel=0.2)
    critic = seen(latent, torch.ones_like(labels))
    assert critic.separations.item() == 0
    assert not estimates(critic, latent, labels).any()
    fresh = KernelCritic(MALE, 3, 100)
    assert not estimates(fresh, latent, labels).any()
    fresh.solve()
    assert not estimates(fresh, latent, labels).any(), "of nothing there is a solution, too"


def test_it_remembers_the_last_ones_and_solves_for_as_many_as_there_are():
    latent, labels = drawn(0.4, 2.0)
    other, other_labels = drawn(0.4, 0.0, seed=2)
    critic = KernelCritic(MALE, 3, MANY).train()
    for rows in torch.arange(MANY).split(300):  # the last of them is not full
        critic.observe(MALE, other[rows], other_labels[rows], identity)
    for rows in torch.arange(MANY).split(300):
        critic.observe(MALE, latent[rows], labels[rows], identity)
    critic.solve()
    assert critic.separations.item() == pytest.approx(separation(latent, labels), rel=1e-3), "of old ones nothing is left"
    half = KernelCritic(MALE, 3, MANY).train()
    half.observe(MALE, latent[:400], labels[:400], identity)
    half.solve()
    assert half.separations.item() == pytest.approx(separation(latent[:400], labels[:400]), rel=1e-3)
    want = estimates(seen(latent[:400], labels[:400]), other, labels)
    assert torch.allclose(estimates(half, other, labels), want, rtol=1e-3, atol=1e-4)
    larger = KernelCritic(MALE, 3, 500).train()
    larger.observe(MALE, latent, labels, identity)
    larger.solve()
    assert larger.separations.item() == pytest.approx(separation(latent[500:], labels[500:]), rel=1e-3)


def test_between_solutions_it_reads_by_the_last_one():
    latent, labels = drawn(0.4, 2.0)
    critic = seen(latent, labels)
    before = estimates(critic, latent, labels)
    critic.observe(MALE, *drawn(0.4, 0.0, seed=2), identity)
    assert torch.equal(estimates(critic, latent, labels), before)
    critic.solve()
    assert not torch.allclose(estimates(critic, latent, labels), before)


def test_in_eval_mode_it_does_not_look():
    critic = KernelCritic(MALE, 3, 100).eval()
    critic.observe(MALE, *drawn(0.5, 1.0), identity)
    assert critic.seen.item() == 0


def test_two_ranks_know_what_one_process_knows():
    latent, labels = drawn(0.3, 1.0)
    whole, given = seen(latent, labels), []
    for part in (slice(0, 400), slice(400, None)):  # what each rank gives
        KernelCritic(MALE, 3, MANY).train().observe(MALE, latent[part], labels[part], lambda x: (given.append(x), x)[1])
    rank = KernelCritic(MALE, 3, MANY).train()
    rank.observe(MALE, latent[:400], labels[:400], lambda x: torch.cat(given))
    rank.solve()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rank.buffers(), whole.buffers()))


def test_autocast_leaves_it_alone():
    latent, labels = drawn(0.3, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = estimates(seen(latent, labels), latent, labels)
    assert torch.equal(found, estimates(seen(latent, labels), latent, labels))


def test_what_is_not_finite_is_left_out_and_nothing_that_was_known_is_lost():
    """Also in a phase that trains nothing, of which the engine undoes nothing."""
    latent, labels = drawn(0.5, 1.0)
    critic = seen(latent, labels)
    before = estimates(critic, latent, labels)
    for wrong in (math.nan, math.inf):
        damaged = latent.clone()
        damaged[0, 0] = wrong
        critic.observe(MALE, damaged, labels, identity)
        critic.solve()
        assert torch.equal(estimates(critic, latent, labels), before)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="too many to solve"):
        KernelCritic(MALE, 8, 100_000)
    with pytest.raises(ValueError, match="must be positive"):
        KernelCritic(MALE, 8, 0)
    with pytest.raises(ValueError, match="must be positive"):
        KernelCritic(MALE, 8, ridge=0)
