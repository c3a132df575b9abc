"""Every formula against numbers worked by hand; schedules as functions of images."""

from __future__ import annotations

import math

import pytest
import torch

from fader.attributes import Attribute, Attributes
from fader.draws import Draws
from fader.losses.adversarial import GAMES, patch_losses, r1_penalties
from fader.losses.attributes import accuracies, attribute_loss, fool_loss
from fader.losses.reconstruction import absolute_errors, squared_errors
from fader.schedules import Schedule, ema_decay, ramp

TWO = Attributes([Attribute("Male"), Attribute("Hair", "k-way", ("black", "blond", "brown"))])


def draws(count: int) -> Draws:
    return Draws.of(0, "test", 0, torch.arange(count))


def test_squared_errors_are_means_over_an_images_pixels():
    images = torch.zeros(2, 3, 4, 4)
    reconstruction = torch.zeros(2, 3, 4, 4)
    reconstruction[1] = 0.5
    reconstruction[0, 0, 0, 0] = 2.0
    assert squared_errors(reconstruction, images).tolist() == pytest.approx([4 / 48, 0.25])
    assert absolute_errors(reconstruction, images).tolist() == pytest.approx([2 / 48, 0.5])
    for errors in (squared_errors, absolute_errors):
        with pytest.raises(ValueError, match="a reconstruction"):
            errors(reconstruction, images[:, :1])


@pytest.mark.parametrize(
    "loss", [lambda x: squared_errors(x, torch.zeros_like(x)), lambda x: patch_losses(x[:, 0, 0, 0], 0.8)]
)
def test_half_precision_is_widened_and_double_stays_double(loss):
    x = torch.full((2, 3, 4, 4), 0.3)
    assert loss(x.bfloat16()).dtype == torch.float32
    assert loss(x).dtype == torch.float32
    assert loss(x.double()).dtype == torch.float64


def test_attribute_loss_sums_over_attributes_and_averages_over_the_known():
    """Logits that say nothing cost ln 2 for a binary and ln 3 for a 3-way attribute, however many are unknown."""
    labels = torch.tensor([[1.0, 2.0], [0.0, -1.0], [-1.0, 0.0]])
    known = torch.tensor([2.0, 2.0])
    loss = attribute_loss(TWO, torch.zeros(3, 5), labels, known, "softmax")
    assert loss.item() == pytest.approx(math.log(2) + math.log(3), rel=1e-6)
    loss = attribute_loss(TWO, torch.zeros(3, 4), labels, known, "sigmoid")
    assert loss.item() == pytest.approx(math.log(2) + math.log(3), rel=1e-6)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_fool_loss_is_low_when_the_discriminator_is_wrong(head):
    male = Attributes([Attribute("Male")])
    label, one = torch.tensor([[1.0]]), torch.ones(1)
    strength = 3.0
    says_absent = torch.tensor([[strength, 0.0]]) if head == "softmax" else torch.tensor([[-strength]])
    right, wrong = math.log(1 + math.exp(strength)), math.log(1 + math.exp(-strength))
    assert attribute_loss(male, says_absent, label, one, head).item() == pytest.approx(right, rel=1e-6)
    assert fool_loss(male, says_absent, label, one, draws(1), head).item() == pytest.approx(wrong, rel=1e-6)


def test_fool_loss_of_a_k_way_attribute_aims_at_the_drawn_category():
    hair = Attributes([TWO[1]])
    labels = torch.tensor([[0.0], [1.0], [2.0], [-1.0]])
    logits = torch.randn(4, 3)
    target = hair.flipped(labels, draws(4))[:3, 0].long()
    want = torch.nn.functional.cross_entropy(logits[:3], target)
    got = fool_loss(hair, logits, labels, torch.tensor([3.0]), draws(4), "softmax")
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


def test_patch_losses_by_hand():
    """Target 0.8 at p = 0.5 and 0.9: -0.8 ln p - 0.2 ln(1 - p)."""
    losses = patch_losses(torch.tensor([0.5, 0.9]), 0.8)
    want = [math.log(2), -0.8 * math.log(0.9) - 0.2 * math.log(0.1)]
    assert losses.tolist() == pytest.approx(want, rel=1e-5)
    assert patch_losses(torch.tensor([0.9]), 1.0).item() == pytest.approx(-math.log(0.9), rel=1e-5)
    assert patch_losses(torch.tensor([0.9]), 0.0).item() == pytest.approx(-math.log(0.1), rel=1e-5)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        patch_losses(torch.tensor([0.5]), 1.2)


def test_patch_losses_stay_finite_at_the_ends():
    p = torch.tensor([0.0, 1.0], requires_grad=True)
    for target in (0.0, 0.2, 1.0):
        losses = patch_losses(p, target)
        (gradient,) = torch.autograd.grad(losses.sum(), p)
        assert losses.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", GAMES)
def test_the_sides_of_a_game_by_hand(name):
    """Logits 2 and -0.5 of a real and a decoded image, and 0 and 0, where nothing is told."""
    game, log = GAMES[name], lambda x: math.log(1 + math.exp(x))
    real, decoded = torch.tensor([2.0, 0.0]), torch.tensor([-0.5, 0.0])
    discriminator, maker = {
        "non_saturating": ([log(-2) + log(-0.5), 2 * math.log(2)], [log(0.5), math.log(2)]),
        "hinge": ([0 + 0.5, 2], [0.5, 0]),
        "relativistic": ([log(-2.5), math.log(2)], [log(2.5), math.log(2)]),
    }[name]
    assert game.discriminator(real, decoded).tolist() == pytest.approx(discriminator, rel=1e-6)
    assert game.maker(real, decoded).tolist() == pytest.approx(maker, rel=1e-6)


@pytest.mark.parametrize("name", GAMES)
def test_the_sides_of_a_game_pull_the_decoded_images_apart(name):
    """The discriminator's loss falls as the decoded logit falls, the maker's as it rises; both stay finite far out."""
    real, decoded = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    decoded.requires_grad_()
    (down,) = torch.autograd.grad(GAMES[name].discriminator(real, decoded).sum(), decoded)
    (up,) = torch.autograd.grad(GAMES[name].maker(real, decoded).sum(), decoded)
    assert (down >= 0).all() and (down > 0).any() and (up < 0).all()
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    for side in (GAMES[name].discriminator, GAMES[name].maker):
        losses = side(far, far.flip(0))
        assert losses.isfinite().all() and torch.autograd.grad(losses.sum(), far)[0].isfinite().all()
    assert GAMES[name].maker(real.bfloat16(), decoded.bfloat16()).dtype == torch.float32


def discriminator() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.Softplus(), torch.nn.Flatten(), torch.nn.Linear(4 * 4 * 4, 1)
    return torch.nn.Sequential(*layers).double()


def test_r1_is_the_squared_gradient_of_each_image_and_its_own_gradient_is_right():
    """In float64: against each record's own gradient, and against finite differences of the penalty in the weights."""
    network, images = discriminator(), torch.randn(5, 3, 6, 6, dtype=torch.float64)
    penalties = r1_penalties(network(images.requires_grad_())[:, 0], images)
    for image, penalty in zip(images.detach(), penalties):
        slope = torch.autograd.functional.jacobian(lambda x: network(x[None])[0, 0], image)
        assert penalty.item() == pytest.approx(slope.square().sum().item(), rel=1e-12)
    parameters = list(network.parameters())

    def penalty(*weights: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(network, dict(zip(dict(network.named_parameters()), weights)), images)
        return r1_penalties(logits[:, 0], images).mean()

    assert torch.autograd.gradcheck(penalty, [p.detach().clone().requires_grad_() for p in parameters[:-1]] + parameters[-1:])


def test_r1_of_a_linear_discriminator_is_its_squared_weight():
    weight = torch.randn(12, dtype=torch.float64, requires_grad=True)
    images = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    penalties = r1_penalties(images.flatten(1) @ weight, images)
    assert torch.allclose(penalties, weight.square().sum().expand(4))
    (gradient,) = torch.autograd.grad(penalties.mean(), weight)
    assert torch.allclose(gradient, 2 * weight)


@pytest.mark.parametrize("head, male", [("softmax", [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), ("sigmoid", [[1.0]] * 3)])
def test_accuracies_count_the_known_only(head, male):
    logits = torch.cat([torch.tensor(male), torch.eye(3)], 1)
    labels = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 2.0]])
    assert accuracies(TWO, logits, labels, torch.tensor([2.0, 3.0]), head).tolist() == pytest.approx([0.5, 2 / 3])
    assert accuracies(TWO, logits, -torch.ones(3, 2), torch.zeros(2), head).tolist() == [0, 0]


def test_accuracy_of_a_continuous_attribute_is_one_minus_its_error():
    age = Attributes([Attribute("Age", "continuous")])
    got = accuracies(age, torch.zeros(2, 1), torch.tensor([[0.25], [1.0]]), torch.tensor([2.0]), "softmax")
    assert got.item() == pytest.approx(1 - (0.25 + 0.5) / 2)


def test_the_ramp_is_linear_in_images_and_then_constant():
    over = 16_000_000
    assert ramp(1e-4, 0, over=over) == 0.0
    assert ramp(1e-4, over // 4, over=over) == pytest.approx(0.25e-4, rel=1e-12)
    assert ramp(1e-4, over, over=over) == 1e-4 == ramp(1e-4, 10 * over, over=over)
    assert ramp(1e-4, over - 32, over=over) < 1e-4
    assert ramp(1e-4, 0, over=0) == 1e-4, "no ramp: there from the start"
    assert ramp(0.0, over, over=over) == 0.0
    for images, span in ((-1, 10), (1, -10)):
        with pytest.raises(ValueError, match="negative"):
            ramp(1.0, images, over=span)


def test_shapes_of_a_rising_weight():
    shapes = ("linear", "cosine", "step", "constant")
    rises = {rise: Schedule(2.0, over=100, after=50, rise=rise) for rise in shapes}
    at = {rise: [s.at(images) for images in (0, 49, 50, 75, 100, 149, 150, 999)] for rise, s in rises.items()}
    assert all(values[:2] == [0, 0] and values[-2:] == [2, 2] for values in at.values()), "0 before, all of it after"
    assert at["linear"][2:5] == [0, 0.5, 1]
    assert at["cosine"][2:5] == pytest.approx([0, 1 - math.sqrt(0.5), 1])
    assert at["step"][2:6] == [0, 0, 0, 0]
    assert at["constant"][2:6] == [2, 2, 2, 2]
    assert Schedule(2.0, over=28).at(7) == ramp(2.0, 7, over=28)


def test_the_published_ramp_is_500_000_iterations_of_32_images():
    assert all(ramp(1e-4, 32 * i, over=16_000_000) == pytest.approx(1e-4 * i / 500_000) for i in (1, 1000, 499_999))


def test_ema_decay_halves_in_its_half_life_whatever_the_step():
    assert ema_decay(1000, 1000) == 0.5
    assert ema_decay(1000, 10) ** 100 == pytest.approx(0.5)
    with pytest.raises(ValueError, match="positive"):
        ema_decay(0, 10)
