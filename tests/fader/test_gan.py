"""The GAN kit: sizes as published, spectral norm and losses against plain references, and each side learns alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fader.attributes import Attribute, Attributes
from fader.losses.adversarial import multi_hinges
from fader.losses.attributes import condition_loss, smoothed
from fader.losses.latents import gaussian_divergences, natural_steps
from fader.methods import CGan, CGanSettings, IcGan, IcGanSettings, VacGan, VacGanSettings
from fader.networks.encoders import Posterior
from fader.networks.generator import Condition
from fader.networks.normalization import BatchNorm, num_parameters
from fader.networks.spectral import SpectralNorm, with_spectral_norm
from tests.fader.tiny import MIXED, changed, context, loss_of, phases, planted, stand, tiny, weights

FORTY = Attributes([Attribute(f"attribute_{i}") for i in range(40)])
EIGHTEEN = Attributes(FORTY[:18])


# --- networks ---------------------------------------------------------------------------------------------------------


def test_a_condition_is_one_where_a_value_is_present_and_minus_one_where_it_is_not():
    labels = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, -1.0]])
    assert Condition(MIXED)(MIXED.code(labels)).tolist() == [[1, -1, -1, 1, -1], [-1, 1, -1, -1, 0]]


def test_generator_and_discriminator_are_document_es_table():
    """4×4 kernels of stride 2; batch norm but in the discriminator's first layer and the generator's last; sides 4 to 64."""
    networks = CGan(CGanSettings(), EIGHTEEN, 64).networks
    generator, discriminator = networks["generator"], networks["discriminator"]
    assert generator.first.weight.shape == (512 * 4 * 4, 100 + 18)
    ups = [layer.deconv for layer in generator.layers]
    assert [(up.in_channels, up.out_channels) for up in ups] == [(512, 256), (256, 128), (128, 64), (64, 3)]
    downs = [discriminator.first.conv, *(layer.conv for layer in discriminator.layers)]
    assert [(down.in_channels, down.out_channels) for down in downs] == [(3, 64), (64 + 18, 128), (128, 256), (256, 512)]
    assert {(layer.kernel_size, layer.stride) for layer in (*ups, *downs)} == {((4, 4), (2, 2))}
    assert [isinstance(layer.norm, nn.Identity) for layer in generator.layers] == [False, False, False, True]
    assert [isinstance(layer.norm, nn.Identity) for layer in (discriminator.first, *discriminator.layers)] == [True, *[False] * 3]
    images = generator(torch.zeros(2, 100), EIGHTEEN.code(torch.zeros(2, 18)))
    assert images.shape == (2, 3, 64, 64)
    assert discriminator(images, EIGHTEEN.code(torch.zeros(2, 18))).shape == (2,)


def test_weights_begin_as_dcgans_do():
    generator = CGan(CGanSettings(), EIGHTEEN, 64).networks["generator"]
    assert generator.first.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert generator.norm.weight.mean().item() == pytest.approx(1, abs=0.01)
    assert generator.norm.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_too_small_an_image_and_no_attribute_are_refused():
    with pytest.raises(ValueError, match="needs at least 16"):
        tiny("cgan", image_size=8)
    with pytest.raises(ValueError, match="at least one attribute"):
        tiny("cgan", Attributes([]))


def as_keras_counts(network: nn.Module) -> int:
    """Parameters, batch norm's moving mean and variance, and one vector u for each spectral norm."""
    buffers = (b for name, b in network.named_buffers() if name.rpartition(".")[2] in ("running_mean", "running_var", "u"))
    return num_parameters(network) + sum(buffer.numel() for buffer in buffers)


def test_vacgans_networks_have_the_published_counts():
    networks = VacGan(VacGanSettings(), FORTY, 64).networks
    counts = {name: as_keras_counts(network) for name, network in networks.items()}
    assert counts == {"generator": 34_955_078, "discriminator": 1_078_817, "classifier": 715_176}


def test_icgans_encoders_are_document_es_table():
    """5×5 kernels of stride 2, hidden layers of 4096 and 512, batch norm everywhere but at the end."""
    networks = IcGan(IcGanSettings(), EIGHTEEN, 64).networks
    for name, (hidden, width) in {"z": (4096, 100), "y": (512, 18)}.items():
        encoder = networks[f"encoder_{name}"]
        convolutions = [layer for layer in encoder.layers if isinstance(layer, nn.Conv2d)]
        assert [(c.in_channels, c.out_channels) for c in convolutions] == [(3, 32), (32, 64), (64, 128), (128, 256)]
        assert {(c.kernel_size, c.stride) for c in convolutions} == {((5, 5), (2, 2))}
        first, *_, last = encoder.heads[name]
        assert (first.in_features, first.out_features) == (256 * 4 * 4, hidden)
        assert (last.in_features, last.out_features) == (hidden, width)
        assert sum(isinstance(layer, BatchNorm) for layer in encoder.modules()) == 5
    cond = IcGan(IcGanSettings(variant="ind_cond"), EIGHTEEN, 64).networks
    assert cond["encoder_z"].layers[0].in_channels == 3 + 18 and cond["encoder_y"].layers[0].in_channels == 3
    vectors = IcGan(IcGanSettings(variant="sng"), EIGHTEEN, 64).networks["encoder"](torch.zeros(2, 3, 64, 64))
    assert {name: tuple(vector.shape) for name, vector in vectors.items()} == {"z": (2, 100), "y": (2, 18)}


# --- spectral norm ----------------------------------------------------------------------------------------------------


def plain_spectral_norm(weight: torch.Tensor, u: torch.Tensor, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The quotient and the next u, a row at a time."""
    rows = weight.unbind(outputs)
    v = sum(a * row for a, row in zip(u, rows))
    v = v / v.square().sum().sqrt()
    products = torch.stack([(row * v).sum() for row in rows])
    sigma = products.square().sum().sqrt()
    return weight / sigma, products / sigma


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3)], ids=["convolution", "transposed"])
def test_spectral_norm_is_its_definition_in_value_and_in_first_and_second_derivative(layer):
    torch.manual_seed(0)
    outputs = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    weight = torch.randn_like(layer.weight, dtype=torch.float64).requires_grad_()
    norm = SpectralNorm(weight, outputs, iterations=0).double()
    u, direction = norm.u.clone(), torch.randn_like(weight)
    want, next_u = plain_spectral_norm(weight, u, outputs)
    found = norm(weight)
    torch.testing.assert_close(norm.u, next_u.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    seconds = []
    for value in (found, want):
        (first,) = torch.autograd.grad((value**3).sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), weight)
        seconds.append((first.detach(), second))
    torch.testing.assert_close(seconds[0], seconds[1], rtol=1e-10, atol=1e-10)
    norm.eval()(weight)
    torch.testing.assert_close(norm.u, next_u.detach(), rtol=1e-12, atol=1e-12)
    for _ in range(200):
        norm.train()(weight)
    largest = torch.linalg.matrix_norm(norm(weight).detach().transpose(0, outputs).flatten(1), 2)
    assert largest.item() == pytest.approx(1, abs=1e-9)


def test_spectral_norm_of_a_network_reaches_every_convolution_and_nothing_else():
    network = with_spectral_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3), nn.Flatten(), nn.Linear(4, 1)))
    for layer, outputs in ((network[0], 0), (network[1], 1)):
        size = torch.linalg.matrix_norm(layer.weight.detach().transpose(0, outputs).flatten(1), 2)
        assert size.item() == pytest.approx(1, abs=0.05)
    assert isinstance(network[3].weight, nn.Parameter)
    assert [name for name, _ in network.named_buffers()] == [f"{i}.parametrizations.weight.0.u" for i in (0, 1)]


# --- losses -----------------------------------------------------------------------------------------------------------


def test_the_cgans_losses_are_their_formulas():
    """Binary cross-entropy with weights 1, 1/2 and 1/2; records whose wrong label is not known to be wrong are spared."""
    method, batch = tiny("cgan"), planted()
    labels = batch.attributes.clone()
    labels[3] = -1
    batch = dataclasses.replace(batch, attributes=labels)
    loss = loss_of(method, "discriminator", batch)
    method = tiny("cgan")
    stand(method, phases(method)["discriminator"])
    discriminator, code = method.networks["discriminator"], MIXED.code(labels)
    fake = discriminator(method.made(method.networks, batch)[0].detach(), code)
    real = discriminator(batch.images, code)
    wrong_labels = labels.clone()
    chosen = batch.draws.uniform("changed", (3,)).argmin(1)
    flipped = MIXED.flipped(labels, batch.draws)
    wrong_labels[torch.arange(12), chosen] = flipped[torch.arange(12), chosen]
    wrong = discriminator(batch.images, MIXED.code(wrong_labels))
    logits, targets = (real, fake, wrong), (torch.ones(12), torch.zeros(12), torch.zeros(12))
    bce = [F.binary_cross_entropy_with_logits(x, t, reduction="none") for x, t in zip(logits, targets)]
    each = bce[0] + 0.5 * bce[1] + 0.5 * bce[2]
    each[3] = bce[0][3] + bce[1][3]
    assert loss.value.item() == pytest.approx(each.mean().item(), rel=1e-5)
    assert sorted(loss.report) == [f"discriminator/{name}" for name in ("loss", "made", "real", "wrong")]


def test_vacgans_losses_are_their_formulas():
    method, batch = tiny("vacgan", classifier_weight=0.5), planted()
    losses = {}
    for name, phase in phases(method).items():  # from the same state each
        method = tiny("vacgan", classifier_weight=0.5)
        losses[name] = loss_of(method, name, batch)
    method = tiny("vacgan", classifier_weight=0.5)
    stand(method, phases(method)["discriminator"])
    discriminator = method.networks["discriminator"]
    fake, real = (discriminator(images)[:, 0] for images in (method.made(method.networks, batch)[0].detach(), batch.images))
    want = (F.relu(1 - real) + F.relu(1 + fake)).mean()
    assert losses["discriminator"].value.item() == pytest.approx(want.item(), rel=1e-5)
    method = tiny("vacgan", classifier_weight=0.5)
    stand(method, phases(method)["classifier"])
    logits, labels = method.networks["classifier"](batch.images), batch.attributes
    assert logits.shape[1] == 5, "one logit a binary attribute, three of the beard"
    want = F.binary_cross_entropy_with_logits(logits[:, [0, 4]], 0.9 * labels[:, [0, 2]]) * 2
    want = (want + F.cross_entropy(logits[:, 1:4], labels[:, 1].long())) / 3
    assert losses["classifier"].value.item() == pytest.approx(want.item(), rel=1e-5)
    part = losses["generator"].report
    value = part["generator/taken"] + 0.5 * part["generator/reading"]
    assert losses["generator"].value.item() == pytest.approx(value.item(), rel=1e-5)


def test_with_even_labels_a_rare_value_weighs_as_much_as_a_common_one():
    """Each value's mean cross-entropy counts alike, in the classifier's loss and in the generator's; nothing else moves."""
    one, batch = Attributes([Attribute("Bald")]), planted(Attributes([Attribute("Bald")]), count=10)
    batch.attributes[:] = torch.tensor([[1.0]] + [[0.0]] * 9)
    losses = {}
    for even in (False, True):
        method = tiny("vacgan", one, even_labels=even, label_smoothing=0.0, others="eval")
        if even:
            method.networks["label_counts"].counts.copy_(torch.tensor([9e6, 1e6]))  # as after many such batches
        for name in ("classifier", "generator"):
            phase = phases(method)[name]
            stand(method, phase)
            report = phase.loss(method.networks, batch, context(method)).report
            losses[name, even] = report["classifier/loss" if name == "classifier" else "generator/reading"].item()
            images = batch.images if name == "classifier" else method.made(method.networks, batch)[0]
            method.networks["classifier"].train(name == "classifier")
            each = F.binary_cross_entropy_with_logits(
                method.networks["classifier"](images)[:, 0], batch.attributes[:, 0], reduction="none"
            ).detach()
            wanted = (each[0] + each[1:].mean()) / 2 if even else each.mean()
            assert losses[name, even] == pytest.approx(wanted.item(), rel=1e-4)
    assert len(set(losses.values())) == 4
    phase = phases(method)["classifier"]
    assert phase.observers == ("label_counts",) and method.networks["label_counts"].counts.tolist() == [9e6 + 9, 1e6 + 1]


def test_smoothing_and_conditions_leave_unknown_and_other_kinds_alone():
    labels = torch.tensor([[1.0, 2.0, -1.0], [0.0, -1.0, 1.0]])
    torch.testing.assert_close(smoothed(MIXED, labels, 0.1), torch.tensor([[0.9, 2.0, -0.9], [0.0, -1.0, 0.9]]))
    found = torch.zeros(2, 5)
    found[1, 1:4] = 7.0  # of an unknown beard
    known = torch.tensor([2.0, 1.0, 1.0])
    assert condition_loss(MIXED, found, labels, known).item() == pytest.approx(1 + 3 + 1)
    found[0] = torch.tensor([1.0, -1, -1, 1, 9])
    assert condition_loss(MIXED, found, labels, known).item() == pytest.approx(0.5 + 0 + 1)


def test_multi_hinges_are_crammers_and_singers():
    """Numbers by hand: two classes and "none". A class that is unknown is any but none."""
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.0, 0.2, 0.1], [0.0, 3.0, 0.4], [1.0, 0.9, 1.5], [1.0, 0.9, -0.5]])
    classes = torch.tensor([0, 1, 2, -1, -1])
    assert multi_hinges(logits, classes).tolist() == pytest.approx([0.0, 0.9, 3.6, 1.5, 0.0])


def test_the_multi_hinge_discriminator_has_one_logit_a_combination_and_one_for_made_images():
    method, batch = tiny("vacgan", game="multi_hinge"), planted()
    assert method.networks["discriminator"].head.out_features == 2 * 3 * 2 + 1
    loss = loss_of(method, "discriminator", batch)
    method = tiny("vacgan", game="multi_hinge")
    stand(method, phases(method)["discriminator"])
    both = torch.cat([batch.images, method.made(method.networks, batch, judging=True)[0]])
    real, fake = method.networks["discriminator"](both).chunk(2)
    want = multi_hinges(real, MIXED.joint(batch.attributes)) + multi_hinges(fake, torch.full((12,), 12))
    assert loss.value.item() == pytest.approx(want.mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="40 attributes have 1,099,511,627,776; name fewer"):
        tiny("vacgan", FORTY, game="multi_hinge")


def test_natural_steps_solve_their_equation():
    """(g gᵀ + β I) Δz = α g."""
    torch.manual_seed(0)
    gradient = torch.randn(5, 3, dtype=torch.float64)
    steps = natural_steps(gradient, 0.9, 0.1)
    fisher = gradient[:, :, None] * gradient[:, None, :] + 0.1 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close((fisher @ steps[:, :, None])[:, :, 0], 0.9 * gradient)


def test_latent_optimisation_makes_the_discriminator_find_images_more_real():
    """A small step raises the logits of those that take it, and the discriminator learns through the step."""
    method, batch = tiny("cgan", latent_step=1e-3, latent_damping=1.0, latent_share=1.0), planted()
    for network in method.networks.values():
        network.eval().double()
        for parameter in network.parameters():
            parameter.data.mul_(10)  # as they begin, the logits hardly depend on the noise
    code = MIXED.code(batch.attributes)
    images, cost = method.made(method.networks, batch)
    plain = method.networks["generator"](method.noise(batch), code)
    before, after = (method.networks["discriminator"](each, code) for each in (plain, images))
    assert (after > before).all() and cost.item() > 0
    method = tiny("cgan", latent_step=0.9, latent_share=0.0)
    stand(method, phases(method)["generator"])
    images, cost = method.made(method.networks, batch)
    other = tiny("cgan")
    stand(other, phases(other)["generator"])
    torch.testing.assert_close(images, other.made(other.networks, batch)[0])
    assert cost.item() == 0


@pytest.mark.parametrize("phase", ["discriminator", "generator"])
def test_the_gradient_goes_through_the_latents_step(phase):
    """Finite differences of the loss agree with its gradient, in which second derivatives stand."""
    method, batch = tiny("cgan", latent_step=0.9), planted(count=6)
    for network in method.networks.values():
        network.double()
    batch, phase = dataclasses.replace(batch, images=batch.images.double()), phases(method)[phase]
    stand(method, phase)
    parameters = [p for n in phase.trains for p in method.networks[n].parameters()]

    def value() -> torch.Tensor:
        return phase.loss(method.networks, batch, context(method)).value

    gradients = torch.autograd.grad(value(), parameters)
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    values = []
    for step in (1e-7, -2e-7):
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=step)
        values.append(value().item())
    slope = sum((g * d).sum() for g, d in zip(gradients, directions)).item()
    assert slope == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-4)


def test_the_divergence_is_torchs_and_a_latent_is_drawn_from_its_distribution():
    torch.manual_seed(0)
    mean, log_variance = torch.randn(2, 4, 3, dtype=torch.float64)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    want = torch.distributions.kl_divergence(normal, torch.distributions.Normal(torch.zeros(()), torch.ones(()))).sum(1)
    torch.testing.assert_close(gaussian_divergences(mean, log_variance), want)
    noise = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(Posterior(mean, log_variance).at(noise), mean + normal.scale * noise)


def test_the_vaegans_encoder_learns_nothing_from_the_discriminators_verdict():
    """With only λ_P on, its gradient is 0, and the decoder's is not."""
    weights = {"pixel_weight": 0.0, "feature_weight": 0.0, "kl_weight": 0.0, "discriminator_weight": 1.0}
    method = tiny("vaegan", **weights)
    loss_of(method, "encoder+decoder", planted()).value.backward()
    most = {name: max(p.grad.abs().max() for p in method.networks[name].parameters()) for name in ("encoder", "decoder")}
    assert most["encoder"] == 0 and most["decoder"] > 0
    method = tiny("vaegan", **{**weights, "feature_weight": 1.0})
    loss_of(method, "encoder+decoder", planted()).value.backward()
    assert max(p.grad.abs().max() for p in method.networks["encoder"].parameters()) > 0


def test_icgans_stages_follow_its_variant():
    def stages(variant: str) -> list[str]:
        return [stage.name for stage in tiny("icgan", variant=variant).stages()]

    assert stages("ind") == ["gan", "statistics", "encoder_z", "encoder_y"]
    assert stages("ind_cond") == ["gan", "statistics", "encoder_y", "encoder_z"]
    assert stages("sng") == ["gan", "statistics", "encoder"]
    assert [stage.images for stage in tiny("icgan", images=1000).stages()] == [1000, 2, 600, 600]


def test_refreshed_statistics_are_the_generators_alone_and_come_from_its_last_weights():
    method, batch = tiny("icgan"), planted()
    before = weights(method)
    stand(method, phases(method)["statistics"])
    phases(method)["statistics"].loss(method.networks, batch, context(method))
    assert changed(before, method) == {"generator"}
    generator = method.networks["generator"]
    known = torch.cat([method.noise(batch), generator.condition(MIXED.code(batch.attributes))], 1)
    maps = generator.first(known).unflatten(1, (-1, 4, 4))
    torch.testing.assert_close(generator.norm.running_mean, 0.1 * maps.mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["ind", "ind_cond", "sng"])
def test_an_icgan_that_knows_its_noise_edits_by_labels_alone(variant):
    method, batch = tiny("icgan", variant=variant), planted()
    for network in method.networks.values():
        network.eval()
    with torch.no_grad():
        latent = method.encode(batch.images, batch.attributes)
        code = MIXED.code(batch.attributes)
        assert torch.equal(method.decode(latent, code), method.sample(latent, code))
        assert torch.equal(latent, method.encode(batch.images, torch.zeros_like(batch.attributes)))
    needed = {"sng": ["encoder"], "ind": ["encoder_z"], "ind_cond": ["encoder_z", "encoder_y"]}[variant]
    assert set(method.for_use) == {"generator", *needed}


@pytest.mark.parametrize("changes", [{}, {"game": "hinge", "spectral_norm": True}, {"game": "relativistic"}])
@pytest.mark.parametrize("phase", ["discriminator", "generator"])
def test_each_side_of_a_gan_wins_against_one_that_stands_still(changes, phase):
    method, batch = tiny("cgan", **changes), planted()
    phase, values = phases(method)[phase], []
    stand(method, phase)
    parameters = [p for n in phase.trains for p in method.networks[n].parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-2, (0.5, 0.999))
    for _ in range(30):
        loss = phase.loss(method.networks, batch, context(method))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        values.append(loss.value.item())
    assert values[-1] < values[0] - 0.15, values


def test_phases_follow_the_settings():
    (stage,) = tiny("cgan", discriminator_steps=2, others="eval", discriminator_learning_rate=1e-3).stages()
    assert [(phase.name, phase.repeat, phase.source, phase.others) for phase in stage.phases] == [
        ("discriminator", 2, "images", "eval"),
        ("generator", 1, "labels", "eval"),
    ]
    (stage,) = tiny("cgan", game="relativistic").stages()
    assert stage.phases[1].source == "images", "real images are compared with"
    rates = tiny("cgan", discriminator_learning_rate=1e-3).optimizers()
    assert [rates[(name,)].learning_rate for name in ("discriminator", "generator")] == [1e-3, 2e-4]
