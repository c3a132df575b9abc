"""The image adversary: what its discriminator sees, whom swaps show, its penalty, and that edits follow from it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fader.adversaries.sight import SightSettings, seen
from fader.attributes import Attribute, Attributes, one_changed
from fader.counts import LabelCounts
from fader.draws import Draws
from fader.losses.attributes import log_odds
from fader.method import Batch
from fader.networks.discriminators import ImageDiscriminator
from tests.fader.tiny import MIXED, context, loss_of, phases, planted, stand, tiny_fader

IMAGE = {"weight": 1.0}
BLIND = {name: 0 for name in ("shift", "blur", "brightness", "tint", "contrast", "saturation", "grey", "noise")} | {"flip": False}


def draws(count: int) -> Draws:
    return Draws.of(5, "test", 0, torch.arange(count))


def sight(images: torch.Tensor, name: str = "real", **settings) -> torch.Tensor:
    return seen(images, draws(len(images)), name, SightSettings(**{**BLIND, **settings}))


def pictures(count: int, channels: int = 3) -> torch.Tensor:
    """Random pictures of 64 numbers a side, the same at each call."""
    return torch.rand(count, channels, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_sight_of_which_everything_is_0_is_the_image_itself():
    assert torch.equal(sight(pictures(4)), pictures(4))
    assert torch.equal(sight(pictures(4, channels=1)), pictures(4, channels=1))


def test_a_shift_is_in_whole_pixels_up_to_its_bound_and_repeats_the_edge():
    images, moved = pictures(200), sight(pictures(200), shift=1 / 16)
    found = set()
    for image, other in zip(images, moved):
        shifts = [(y, x) for y in range(-4, 5) for x in range(-4, 5)
                  if torch.equal(other[:, 8:-8, 8:-8], image[:, 8 - y : 56 - y, 8 - x : 56 - x])]  # fmt: skip
        assert len(shifts) == 1
        (y, x) = shifts[0]
        rows, columns = (torch.arange(64) - y).clamp(0, 63), (torch.arange(64) - x).clamp(0, 63)
        assert torch.equal(other, image[:, rows][:, :, columns])
        found.add((y, x))
    assert {y for y, _ in found} == {x for _, x in found} == set(range(-4, 5))


def test_half_of_the_images_are_mirrored_and_some_are_blurred_grey_or_noisy():
    images = pictures(120)
    turned = sight(images, flip=True)
    mirrored = (turned == images.flip(3)).flatten(1).all(1)
    assert 0.4 < mirrored.float().mean() < 0.6
    assert torch.equal(turned[~mirrored], images[~mirrored])
    rough, soft = lambda x: x.diff(dim=3).square().flatten(1).mean(1), sight(images, blur=1.2)  # noqa: E731
    blurred = rough(soft) < 0.9 * rough(images)
    assert 0.3 < blurred.float().mean() < 0.6, "half, and of these some a little only"
    assert torch.allclose(soft.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=0.02)
    grey = sight(images, grey=0.25)
    without = (grey.amax(1) - grey.amin(1)).flatten(1).amax(1) < 1e-5
    assert 0.2 < without.float().mean() < 0.3
    noise = (sight(images, noise=0.06) - images).flatten(1).std(1)
    assert 0.25 < (noise > 0).float().mean() < 0.42 and noise[noise > 0].mean().item() == pytest.approx(0.06, rel=0.05)


def test_colours_move_within_their_bounds_each_image_on_its_own():
    flat = torch.full((500, 3, 8, 8), 0.5) * torch.tensor([1.0, 0.4, -0.4])[:, None, None]
    for name, low, high in (("brightness", -0.2, 0.2), ("tint", -0.2, 0.2)):
        change = (sight(flat, **{name: 0.2}) - flat).mean((2, 3))
        assert change.min() >= low and change.max() <= high and change.std() > 0.08
        assert ((change.amax(1) - change.amin(1)).max() < 1e-6) == (name == "brightness"), "a tint has a number for each colour"
    ratio = sight(flat, contrast=0.2) / flat
    assert 0.8 <= ratio.min() and ratio.max() <= 1.2 and ratio.flatten(1).std(1).max() < 1e-6
    spread = lambda x: (x.amax(1) - x.amin(1))[:, 0, 0]  # noqa: E731
    share = spread(sight(flat, saturation=0.5)) / spread(flat)
    assert 0.5 <= share.min() < 0.6 and 1.4 < share.max() <= 1.5


def test_a_record_is_seen_alike_in_any_company_and_by_another_name_otherwise():
    images, every = pictures(6), SightSettings()
    whole = seen(images, draws(6), "real", every)
    part = seen(images[3:], dataclasses.replace(draws(6), index=torch.arange(3, 6)), "real", every)
    assert torch.equal(whole[3:], part)
    assert not torch.allclose(whole, seen(images, draws(6), "decoded", every))


def test_sight_is_differentiable_and_as_precise_under_autocast():
    images = pictures(2).double()[:, :, :4, :4].requires_grad_()
    given = SightSettings(shift=0.25)
    assert torch.autograd.gradcheck(lambda x: seen(x, draws(2), "real", given), (images,))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sight(pictures(2)), pictures(2))


# --- whom swaps show --------------------------------------------------------------------------------------------------


def targets(batch: Batch, **settings) -> torch.Tensor:
    (adversary,) = tiny_fader(latent={"steps": 0}, image=IMAGE | settings).adversaries
    return adversary.targets(LabelCounts(MIXED), MIXED, batch)


def test_a_swap_changes_one_attribute_or_takes_another_records_labels():
    batch = planted(count=600)
    labels = batch.attributes.clone()
    labels[:100, 1] = -1
    batch = dataclasses.replace(batch, attributes=labels)
    one = targets(batch, one_changed=1.0)
    moved = one != labels
    assert moved.sum(1).max() == 1 and moved[100:].any(1).all(), "one attribute of each, and never to its own value"
    assert not moved[:100, 1].any(), "an unknown label stays unknown"
    assert ((moved.float().mean(0) - 1 / 3).abs() < 0.08).all()
    other = targets(batch, one_changed=0.0)
    known = {tuple(row) for row in labels.tolist()}
    assert {tuple(row) for row in other.tolist()} <= known and (other != labels).any()
    even = targets(batch, one_changed=0.0, others="uniform")
    assert (even >= 0).all() and ((even[:, 1] == 2).float().mean() - 1 / 3).abs() < 0.08
    both = targets(batch, one_changed=0.7)
    assert 0.6 < (both == one).all(1).float().mean() < 0.95


def test_a_rare_value_is_changed_as_often_as_a_common_one():
    two = Attributes([Attribute("Male"), Attribute("Eyeglasses")])
    labels = torch.stack([torch.arange(4000) % 2, torch.arange(4000) % 20 == 0], 1).float()
    counts = LabelCounts(two)
    counts.add(two, labels, lambda total: total)
    shares = counts.shares(two, torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, -1.0]]))
    torch.testing.assert_close(shares, torch.tensor([[1.0, 0.1], [1.0, 1.9], [1.0, 1.9]]), atol=2e-3, rtol=0)
    moved = one_changed(two, labels, counts.shares(two, labels), draws(4000)) != labels
    rare = labels[:, 1] == 1
    assert moved.sum(1).eq(1).all()
    assert moved[rare, 1].float().mean().item() == pytest.approx(1 / 1.1, abs=0.06), "1 / 0.1 against 1"
    assert moved[~rare, 1].float().mean().item() == pytest.approx(1 / 2.9, abs=0.03), "1 / 1.9 against 1"


# --- losses -----------------------------------------------------------------------------------------------------------


def test_log_odds_favour_the_label_over_all_other_values():
    mixed = Attributes([Attribute("Male"), Attribute("Hair", "k-way", ("black", "blond", "brown")), Attribute("Age", "continuous")])
    labels = torch.tensor([[1.0, 2.0, 0.3], [0.0, -1.0, 0.9]])
    logits = torch.tensor([[0.5, 1.0, 2.0, 3.0, 0.7], [0.5, 1.0, 2.0, 3.0, -0.7]])
    odds = log_odds(mixed, logits, labels, "sigmoid")
    hair = torch.log_softmax(logits[0, 1:4], 0)[2] - torch.log1p(-torch.softmax(logits[0, 1:4], 0)[2])
    assert odds.flatten().tolist() == pytest.approx([0.5, hair.item(), 0.7, -0.5, 0, -0.7])
    pair = torch.tensor([[0.2, 1.0], [0.2, 1.0]])
    assert log_odds(mixed.select(["Male"]), pair, labels[:, :1], "softmax").flatten().tolist() == pytest.approx([0.8, -0.8])


def test_the_penalised_phase_is_the_discriminators_loss_and_r1_for_all_steps_until_it_comes_again():
    """In float64, against each image's own gradient."""
    image = IMAGE | {"r1": 3.0, "r1_every": 4, "r1_reading": 0.5, "sight": BLIND}
    method, batch = tiny_fader(latent={"steps": 0}, image=image), planted()
    batch = dataclasses.replace(batch, images=batch.images.double())
    for network in method.networks.values():
        network.double()
    plain, more = phases(method)["image_discriminator"], phases(method)["image_discriminator_r1"]
    assert (plain.every, more.every, plain.trains, more.trains) == (1, 4, ("image_discriminator",), ("image_discriminator",))
    before = loss_of(method, "image_discriminator", batch).value
    method.networks["image_discriminator"].counts.counts.fill_(1)
    loss = loss_of(method, "image_discriminator_r1", batch)
    network, slopes = method.networks["image_discriminator"], []
    for image, label in zip(batch.images, batch.attributes):
        def score(x: torch.Tensor, label: torch.Tensor = label) -> torch.Tensor:
            verdict = network(x[None])
            return (verdict.real + 0.5 * log_odds(MIXED, verdict.attributes, label[None], "softmax").sum(1))[0]

        slopes.append(torch.autograd.functional.jacobian(score, image).square().sum())
    penalty = torch.stack(slopes).mean()
    assert loss.report["image_discriminator/r1"].item() == pytest.approx(penalty.item(), rel=1e-9)
    assert loss.value.item() == pytest.approx(before.item() + 3 / 2 * 4 * penalty.item(), rel=1e-9)
    assert "image_discriminator_r1" not in phases(tiny_fader(image=IMAGE | {"r1": 0.0}))


def test_the_autoencoders_loss_is_its_formula():
    """|x̂ - x|, being taken for real, and being read as asked, where a changed attribute counts more."""
    one = Attributes([Attribute("Smiling")])
    settings = {"reading": 3.0, "emphasis": (1.5,), "changed": 2.0, "one_changed": 1.0, "sight": BLIND, "weight": 0.5}
    method = tiny_fader(one, latent={"steps": 0}, image=settings, reconstruction={"weight": 20.0, "error": "absolute"})
    batch = planted(one)
    loss = loss_of(method, "encoder+decoder", batch)
    report = {key.split("/")[1]: float(value) for key, value in loss.report.items()}
    method.networks["encoder"].train(), method.networks["decoder"].train()
    with torch.no_grad():
        latent = method.networks["encoder"](batch.images)
        reconstruction = method.networks["decoder"](latent, one.code(batch.attributes))
        verdict = method.networks["image_discriminator"](method.networks["decoder"](latent, one.code(1 - batch.attributes)))
    taken = torch.nn.functional.softplus(-verdict.real).mean().item()
    reading = 1.5 * 2 * torch.nn.functional.cross_entropy(verdict.attributes, (1 - batch.attributes[:, 0]).long()).item()
    assert (report["taken"], report["reading"]) == pytest.approx((taken, reading), rel=1e-4)
    absolute = (reconstruction - batch.images).abs().mean().item()
    assert loss.value.item() == pytest.approx(20 * absolute + 0.5 * (taken + 3 * reading), rel=1e-4)
    with pytest.raises(ValueError, match="emphasis has 2 numbers for 1 attributes"):
        tiny_fader(one, image=settings | {"emphasis": (1.0, 2.0)})


def test_the_discriminator_learns_the_old_attributes_of_swaps():
    """Its loss is its formula, in which a swap has the labels that its image had."""
    one = Attributes([Attribute("Smiling")])
    method = tiny_fader(one, latent={"steps": 0}, image=IMAGE | {"one_changed": 1.0, "own_reading": 0.5, "traces": 0.2, "sight": BLIND})
    batch, networks = planted(one), method.networks
    loss = loss_of(method, "image_discriminator", batch)
    with torch.no_grad():
        swap = networks["decoder"](networks["encoder"](batch.images), one.code(1 - batch.attributes))
        real, decoded = (networks["image_discriminator"](images) for images in (batch.images, swap))
    told = (torch.nn.functional.softplus(-real.real) + torch.nn.functional.softplus(decoded.real)).mean()
    old = batch.attributes[:, 0].long()
    reading, traces = (torch.nn.functional.cross_entropy(verdict.attributes, old) for verdict in (real, decoded))
    assert loss.report["image_discriminator/traces"].item() == pytest.approx(traces.item(), rel=1e-4)
    assert loss.value.item() == pytest.approx((told + 0.5 * (reading + 0.2 * traces)).item(), rel=1e-4)


def test_rare_values_are_learnt_with_their_frequency_and_asked_for_without():
    """Logits that say only how frequent values are cost the labels' entropy in training, and ln 2 of a swap."""
    one = Attributes([Attribute("Eyeglasses")])
    method = tiny_fader(one, latent={"steps": 0}, image=IMAGE | {"one_changed": 1.0}, head="sigmoid")
    network = method.networks["image_discriminator"]
    for parameter in network.attributes.parameters():
        torch.nn.init.zeros_(parameter)
    network.counts.counts.copy_(torch.tensor([90.0, 10.0]))
    labels = (torch.arange(10) == 0).float()[:, None]
    batch = Batch.alone(planted(one, 10).images, labels)
    found = loss_of(method, "image_discriminator", batch).report["image_discriminator/reading"].item()
    assert found == pytest.approx(-(0.9 * torch.tensor(0.9).log() + 0.1 * torch.tensor(0.1).log()).item(), rel=1e-5)
    assert loss_of(method, "encoder+decoder", batch).report["autoencoder/reading"].item() == pytest.approx(0.6931472, rel=1e-5)


def test_an_image_discriminator_has_no_norm_and_two_heads_on_one_trunk():
    network = ImageDiscriminator(64, MIXED, "softmax", init_channels=4, max_channels=20, hidden_channels=8)
    assert [layer.conv.out_channels for layer in network.layers] == [4, 8, 16, 20]
    verdict = network(torch.randn(5, 3, 64, 64))
    assert verdict.real.shape == (5,) and verdict.attributes.shape == (5, MIXED.logits_width("softmax"))
    alone = network(torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))[:1])
    together = network(torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(alone.real, together.real[:1])
    with pytest.raises(ValueError, match="needs at least 8"):
        ImageDiscriminator(4, MIXED, "softmax")


def test_edits_follow_a_planted_attribute():
    """The label is the brightness of the whole image. After some steps swaps are as bright as was asked for."""
    one = Attributes([Attribute("Smiling")])
    image = IMAGE | {"reading": 4.0, "r1": 0.1, "init_channels": 8, "max_channels": 16, "sight": BLIND | {"flip": True}}
    method = tiny_fader(one, 16, num_layers=2, latent={"steps": 0}, image=image)
    batch = planted(one, 16, 16)
    optimizers = {
        trains: torch.optim.Adam([p for n in trains for p in method.networks[n].parameters()], 5e-3, group.betas)
        for trains, group in method.optimizers().items()
    }
    for step in range(60):
        for phase in phases(method).values():
            if step % phase.every == 0:
                stand(method, phase)
                drawn = dataclasses.replace(batch, draws=Draws.of(0, phase.name, step, batch.index))
                loss = phase.loss(method.networks, drawn, context(method))
                optimizers[phase.trains].zero_grad()
                loss.value.backward()
                optimizers[phase.trains].step()
    with torch.no_grad():
        for network in method.networks.values():
            network.eval()
        latent = method.encode(batch.images, batch.attributes)
        levels = [method.decode(latent, one.code(torch.full_like(batch.attributes, value))).mean() for value in (0.0, 1.0)]
    assert levels[1] - levels[0] > 0.3, levels
