"""What public attempts at this method got wrong, each planted here: a check passes on our code, fails on the fault.

A check is a function that asserts on the real code path; a plant patches one defect into that path. The sources are the
public re-implementations that ended with a slider that changes nothing, and the official code's own slips.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fader.adversaries.latent as latent_file
import fader.losses.attributes
import fader.methods.fader as method_file
import fader.networks.autoencoder
import fader.networks.discriminators
import fader.networks.layers
from fader.attributes import Attribute, Attributes
from fader.draws import Draws
from fader.losses.attributes import attribute_losses
from fader.method import Batch
from fader.methods import Fader, FaderSettings
from fader.networks.autoencoder import Decoder, Latent, Layout
from fader.networks.discriminators import LatentDiscriminator
from fader.networks.layers import Up
from fader.schedules import Schedule, ramp
from tests.fader.tiny import MIXED, context, loss_of, phases, planted, stand, tiny_fader

MALE = Attributes([Attribute("Male")])
RAMP = 16_000_000

# --- the checks -----------------------------------------------------------------------------------------------------


def code_enters_every_layer_as_it_is() -> None:
    """While training as in use, each decoder layer reads [features, code planes, …], the code being exactly 0 and 1."""
    method, batch = tiny_fader(patch={"weight": 0.1}, num_skips=1), planted()
    seen: list[list[Tensor]] = []
    decoder = method.networks["decoder"]
    decoder.register_forward_pre_hook(lambda module, inputs: seen.append([inputs[1]]))
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen[-1].append(inputs[0]))
    for phase in ("patch_discriminator", "encoder+decoder"):
        loss_of(method, phase, batch)
    decoder.eval()
    method.decode(method.encode(batch.images, batch.attributes), MIXED.code(batch.attributes))
    assert len(seen) == 4, "patch phase, reconstruction, random code, use"
    for code, *inputs in seen:
        assert set(code.unique().tolist()) == {0.0, 1.0}, "the code is smoothed"
        assert len(inputs) == len(decoder.layers)
        for maps, features in zip(inputs, [8, 8, 4]):
            planes = maps[:, features : features + MIXED.code_width]
            assert torch.equal(planes, code[:, :, None, None].expand_as(planes)), f"{features} channels read no code"


def output_is_tanh_alone() -> None:
    method, batch = tiny_fader(), planted()
    last = method.networks["decoder"].layers[-1]
    with torch.no_grad():
        last.deconv.weight.mul_(100)
    seen = []
    last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    decoded = method.decode(method.encode(batch.images, batch.attributes), MIXED.code(batch.attributes))
    assert decoded.min() < -0.9 and decoded.max() > 0.9 and decoded.abs().max() <= 1
    assert torch.equal(decoded, torch.tanh(last.deconv(seen[0])))
    assert isinstance(last.norm, nn.Identity)


def lambda_follows_the_clock() -> None:
    """One method, asked out of order as after resumes: λ = weight · min(images / 16 M, 1), in loss and report."""
    weight = 1e-4
    assert FaderSettings().latent.weight == weight and FaderSettings().latent.ramp_images == RAMP
    method = tiny_fader(latent={"weight": weight, "ramp_images": RAMP}, reconstruction={"weight": 0.0})
    for images in (0, RAMP // 4, 32, 50_000, 50_032, RAMP, 3 * RAMP, RAMP // 2):
        loss = loss_of(method, "encoder+decoder", planted(), images)
        want = weight * min(images / RAMP, 1.0)
        assert float(loss.report["autoencoder/lambda"]) == pytest.approx(want, rel=1e-6), images
        assert loss.value.item() == pytest.approx(want * float(loss.report["autoencoder/fool"]), rel=1e-5), images


def encoder_works_against_the_discriminator() -> None:
    """A step down the encoder's objective is a step up the discriminator's: their gradients oppose each other."""
    method, batch = tiny_fader(reconstruction={"weight": 0.0}, latent={"weight": 1.0}), planted()
    stand(method, phases(method)["encoder+decoder"])
    weights = list(method.networks["encoder"].parameters())
    value = phases(method)["encoder+decoder"].loss(method.networks, batch, context(method)).value
    ours = torch.autograd.grad(value, weights)
    logits = method.networks["latent_discriminator"](method.networks["encoder"](batch.images))
    reading = attribute_losses(method.attributes, logits, batch.attributes, batch.known).sum()
    assert reading.requires_grad, "nothing that the discriminator says reaches the encoder"
    theirs = torch.autograd.grad(reading, weights)
    a, b = (torch.cat([part.flatten() for part in side]) for side in (ours, theirs))
    assert torch.nn.functional.cosine_similarity(a, b, 0) < -0.3, "the encoder does not work against the discriminator"


def fool_gradient_reaches_the_encoder() -> None:
    method = tiny_fader(latent={"weight": 1.0})
    loss = loss_of(method, "encoder+decoder", planted())
    encoder = list(method.networks["encoder"].parameters())
    whole = torch.autograd.grad(loss.value, encoder)
    method = tiny_fader(latent={"weight": 0.0})
    alone = torch.autograd.grad(
        loss_of(method, "encoder+decoder", planted()).value, list(method.networks["encoder"].parameters())
    )
    assert all((a - b).abs().max() > 0 for a, b in zip(whole, alone)), "the fool term moves no weight of the encoder"


def flipped_target_is_another_value() -> None:
    """Read off the loss: with logits that shout one category, the fool loss is low only for records flipped to it."""
    attributes = Attributes([Attribute("Beard", "k-way", ("none", "short", "long")), Attribute("Male")])
    count = 600
    labels = torch.stack([torch.arange(count) % 3, torch.arange(count) % 2], 1).float()
    draws = Draws.of(0, "test", 0, torch.arange(count))
    flipped = attributes.flipped(labels, draws)
    assert torch.equal(flipped[:, 1], 1 - labels[:, 1])
    for category in range(3):
        met = set(flipped[labels[:, 0] == category, 0].tolist())
        assert met == {0.0, 1.0, 2.0} - {float(category)}, f"category {category} is flipped to {met}"
    method = tiny_fader(attributes)
    with torch.no_grad():
        method.networks["latent_discriminator"].head.weight.zero_()
        method.networks["latent_discriminator"].head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 20.0, 0.0]))
    for label, fool in ((0.0, 20.0), (1.0, 0.0)):  # the logits say absent; the encoder wants the opposite of the label
        batch = Batch.alone(torch.zeros(6, 3, 32, 32), torch.tensor([[1.0, label]]).repeat(6, 1))
        report = loss_of(method, "encoder+decoder", batch).report
        got = float(report["autoencoder/fool"]) - torch.log(torch.tensor(3.0)).item()
        assert got == pytest.approx(fool, abs=1e-3), f"label {label}"


def code_is_a_pair_of_planes_an_attribute() -> None:
    assert MALE.code(torch.tensor([[0.0], [1.0]])).tolist() == [[1, 0], [0, 1]]
    layers = Fader(FaderSettings(init_channels=4, max_channels=8, num_layers=3), MALE, 32).networks["decoder"].layers
    assert [layer.deconv.in_channels for layer in layers] == [8 + 2, 8 + 2, 4 + 2]


def latent_discriminator_has_batch_norm_in_every_convolution() -> None:
    for norm in ("global", "instance"):
        layers = tiny_fader(norm=norm).networks["latent_discriminator"].layers
        assert len(layers) == 2
        for layer in layers:
            norms = [m for m in layer.modules() if getattr(m, "running_var", None) is not None]
            assert len(norms) == 1, "a convolution without batch norm"


def dropout_zeroes_elements() -> None:
    """0.3 of the elements, not whole channels, at train time; nothing at eval time. 0.3 is the default."""
    assert FaderSettings().latent.dropout == 0.3
    layout = Layout(64, 3, 16, 64, 3)  # its latent discriminator's first maps are 4×4
    network = LatentDiscriminator(layout, 2, hidden_channels=8)
    latent = Latent(torch.randn(64, 64, 8, 8))
    maps = network.layers[0](latent.latent)
    zero = (maps == 0).float()
    assert zero.mean().item() == pytest.approx(0.3, abs=0.02)
    assert 0 < zero.mean((2, 3)).median() < 1, "whole channels are zeroed"
    assert not (network.eval().layers[0](latent.latent) == 0).any()


def optimizers_are_the_papers() -> None:
    groups = tiny_fader(patch={"weight": 1.0}, classifier={"weight": 1.0}).optimizers()
    assert set(groups) == {("latent_discriminator",), ("patch_discriminator",), ("classifier",), ("encoder", "decoder")}
    for group in groups.values():
        assert (group.kind, group.learning_rate, group.betas, group.clip_norm) == ("adam", 2e-4, (0.5, 0.999), 5.0)
        assert group.weight_decay == 0


def each_attribute_reads_its_own_logits() -> None:
    for head, slices in (("softmax", [(0, 2), (2, 5), (5, 7)]), ("sigmoid", [(0, 1), (1, 4), (4, 5)])):
        batch = planted()
        logits = torch.randn(12, MIXED.logits_width(head), requires_grad=True)
        for loss, (start, stop) in zip(attribute_losses(MIXED, logits, batch.attributes, batch.known, head), slices):
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            columns = gradient.abs().sum(0).nonzero()[:, 0].tolist()
            assert columns == list(range(start, stop)), f"{head}: columns {columns} for {start} to {stop}"


def attribute_losses_are_summed() -> None:
    """40 attributes that nothing is known of cost 40 ln 2; averaged, λ would act as a fortieth of itself."""
    attributes = Attributes([Attribute(f"a{i}") for i in range(40)])
    method = tiny_fader(attributes)
    for parameter in method.networks["latent_discriminator"].head.parameters():
        nn.init.zeros_(parameter)
    batch = Batch.alone(torch.zeros(4, 3, 32, 32), torch.ones(4, 40))
    want = 40 * torch.log(torch.tensor(2.0)).item()
    for phase, key in (("latent_discriminator", "latent_discriminator/loss"), ("encoder+decoder", "autoencoder/fool")):
        assert float(loss_of(method, phase, batch).report[key]) == pytest.approx(want, rel=1e-5)


def decoding_obeys_the_code_it_is_given() -> None:
    """A swap shows the attributes asked for, not those the photo was encoded with."""
    method, batch = tiny_fader(), planted()
    for network in method.networks.values():
        network.eval()
    latent = method.encode(batch.images, batch.attributes)
    own = method.decode(latent, MIXED.code(batch.attributes))
    for attribute in MIXED:
        for value in attribute.values:
            asked = MIXED.swapped(batch.attributes, attribute.name, value)
            moved = (method.decode(latent, MIXED.code(asked)) - own).abs().amax((1, 2, 3)) > 1e-6
            assert torch.equal(moved, (asked != batch.attributes).any(1)), f"{attribute.name} to {value}"


def reconstruction_is_a_mean_over_pixels_in_both_directions_of_grey() -> None:
    """Black for white costs 4: images stand in [-1, 1], and the weight of the fool term is measured against that."""
    batch = planted()
    images = torch.ones_like(batch.images)
    method = tiny_fader()
    method.networks["decoder"].layers[-1].register_forward_hook(lambda module, inputs, output: -torch.ones_like(output))
    batch = Batch.alone(images, batch.attributes)
    assert float(loss_of(method, "encoder+decoder", batch).report["autoencoder/mse"]) == 4.0


# --- the plants -----------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def only_at_the_bottleneck(patch: Patch) -> None:
    """Attributes enter the decoder once, at the latent."""
    real = fader.networks.layers.with_code

    def once(features: Tensor, code: Tensor, *others: Any) -> Tensor:
        return real(features, code if features.shape[-1] == 4 else torch.zeros_like(code), *others)

    patch.setattr(fader.networks.autoencoder, "with_code", once)


def only_at_the_last_layer(patch: Patch) -> None:
    real = fader.networks.layers.with_code

    def late(features: Tensor, code: Tensor, *others: Any) -> Tensor:
        return real(features, code if features.shape[-1] == 16 else torch.zeros_like(code), *others)

    patch.setattr(fader.networks.autoencoder, "with_code", late)


def condition_smoothed_in_training(patch: Patch) -> None:
    """0.9 for 1 while training, 1 in use."""
    real = Decoder.forward

    def smoothed(self: Decoder, latent: Latent, code: Tensor) -> Tensor:
        return real(self, latent, code.clamp(0.1, 0.9) if self.training else code)

    patch.setattr(Decoder, "forward", smoothed)


def relu_and_batch_norm_at_the_output(patch: Patch) -> None:
    real = Up.forward

    def forward(self: Up, x: Tensor) -> Tensor:
        if not self.last:
            return real(self, x)
        return nn.functional.batch_norm(torch.relu(self.deconv(x)), None, None, training=True)

    patch.setattr(Up, "forward", forward)


def lambda_frozen(patch: Patch) -> None:
    """λ is a number read once, when the step was traced."""
    first: list[float] = []

    def frozen(self: Schedule, images: int) -> float:
        first.append(ramp(self.to, images, over=self.over))
        return first[0]

    patch.setattr(Schedule, "at", frozen)


def lambda_ends_at_one(patch: Patch) -> None:
    patch.setattr(Schedule, "at", lambda self, images: min(images, self.over) / self.over)


def lambda_reset_each_epoch(patch: Patch) -> None:
    patch.setattr(Schedule, "at", lambda self, images: ramp(self.to, images % 50_000, over=self.over))


def lambda_counts_from_the_last_start(patch: Patch) -> None:
    """A counter of its own, as one that a resumed run begins again."""
    calls = itertools.count()
    patch.setattr(Schedule, "at", lambda self, images: ramp(self.to, 32 * next(calls), over=self.over))


def lambda_without_a_ramp(patch: Patch) -> None:
    patch.setattr(Schedule, "at", lambda self, images: self.to)


def wrong_sign(patch: Patch) -> None:
    """rec - w · BCE(1 - y, prediction): the encoder is rewarded when the discriminator is right."""
    real = latent_file.fool_loss
    patch.setattr(latent_file, "fool_loss", lambda *arguments: -real(*arguments))


def unflipped(patch: Patch) -> None:
    """The encoder helps the discriminator."""
    patch.setattr(Attributes, "flipped", lambda self, labels, draws: labels)


def detached_prediction(patch: Patch) -> None:
    real = LatentDiscriminator.forward
    patch.setattr(
        LatentDiscriminator,
        "forward",
        lambda self, latent: real(self, Latent(latent.latent.detach(), tuple(skip.detach() for skip in latent.skips))),
    )


def one_minus_a_category(patch: Patch) -> None:
    """The binary rule for every attribute."""
    patch.setattr(Attributes, "flipped", lambda self, labels, draws: 1 - labels)


def any_category(patch: Patch) -> None:
    """A random category, the true one among them."""
    patch.setattr(Attributes, "flipped", lambda self, labels, draws: self.resampled(draws))


def always_the_next_category(patch: Patch) -> None:
    """Never drawn: the latent learns a rotation instead of forgetting."""

    def rotated(self: Attributes, labels: Tensor, draws: Draws) -> Tensor:
        return torch.stack([(labels[:, j] + 1) % a.k for j, a in enumerate(self)], 1)

    patch.setattr(Attributes, "flipped", rotated)


def one_scalar_plane(patch: Patch) -> None:
    patch.setattr(Attributes, "code_width", property(len))
    patch.setattr(Attributes, "code", lambda self, labels: labels.float())


def swapped_columns(patch: Patch) -> None:
    """[present, absent]: sliders run backwards."""
    real = Attributes.code
    patch.setattr(Attributes, "code", lambda self, labels: real(self, labels).flip(1))


def no_norm_in_the_latent_discriminator(patch: Patch) -> None:
    real = fader.networks.discriminators.Down
    patch.setattr(fader.networks.discriminators, "Down", lambda a, b, norm, dropout: real(a, b, None, dropout))


def instance_norm_in_the_latent_discriminator(patch: Patch) -> None:
    real = fader.networks.discriminators.Down
    patch.setattr(fader.networks.discriminators, "Down", lambda a, b, norm, dropout: real(a, b, "instance", dropout))


def whole_channels_dropped(patch: Patch) -> None:
    patch.setattr(torch.nn, "Dropout", torch.nn.Dropout2d)


def dropout_left_on(patch: Patch) -> None:
    class Always(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.p = p

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, self.p, training=True)

    patch.setattr(torch.nn, "Dropout", Always)


def _optimizers_with(**changes) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        real = Fader.optimizers
        patch.setattr(
            Fader,
            "optimizers",
            lambda self: {trains: dataclasses.replace(group, **changes) for trains, group in real(self).items()},
        )

    return plant


def logits_sliced_by_attribute_number(patch: Patch) -> None:
    """[:, j : j + k] instead of the attribute's own offset: right for the first attribute only."""

    def blocks(self: Attributes, logits: Tensor, head: str) -> list[Tensor]:
        return [logits[:, j : j + a.logits_width(head)] for j, a in enumerate(self)]

    patch.setattr(Attributes, "blocks", blocks)


def losses_averaged_over_attributes(patch: Patch) -> None:
    real = fader.losses.attributes.attribute_losses
    patch.setattr(fader.losses.attributes, "attribute_losses", lambda *given: real(*given) / len(given[0]))


def decoded_with_the_original_labels(patch: Patch) -> None:
    """The swap is asked for, the photo's own attributes are decoded."""
    encode, decode, kept = Fader.encode, Fader.decode, []

    def encoding(self: Fader, images: Tensor, labels: Tensor) -> Latent:
        kept.append(self.attributes.code(labels))
        return encode(self, images, labels)

    patch.setattr(Fader, "encode", encoding)
    patch.setattr(Fader, "decode", lambda self, latent, code: decode(self, latent, kept[-1]))


def summed_over_pixels(patch: Patch) -> None:
    real = method_file.squared_errors
    patch.setattr(method_file, "squared_errors", lambda a, b: real(a, b) * b[0].numel())


def measured_on_0_to_1(patch: Patch) -> None:
    real = method_file.squared_errors
    patch.setattr(method_file, "squared_errors", lambda a, b: real((a + 1) / 2, (b + 1) / 2))


DEFECTS: list[tuple[Callable[[], None], list[Callable[[Patch], None]]]] = [
    (
        code_enters_every_layer_as_it_is,
        [only_at_the_bottleneck, only_at_the_last_layer, condition_smoothed_in_training],
    ),
    (output_is_tanh_alone, [relu_and_batch_norm_at_the_output]),
    (
        lambda_follows_the_clock,
        [
            lambda_frozen,
            lambda_ends_at_one,
            lambda_reset_each_epoch,
            lambda_counts_from_the_last_start,
            lambda_without_a_ramp,
        ],
    ),
    (encoder_works_against_the_discriminator, [wrong_sign, unflipped, detached_prediction]),
    (fool_gradient_reaches_the_encoder, [detached_prediction]),
    (flipped_target_is_another_value, [one_minus_a_category, any_category, always_the_next_category, unflipped]),
    (code_is_a_pair_of_planes_an_attribute, [one_scalar_plane, swapped_columns]),
    (
        latent_discriminator_has_batch_norm_in_every_convolution,
        [no_norm_in_the_latent_discriminator, instance_norm_in_the_latent_discriminator],
    ),
    (dropout_zeroes_elements, [whole_channels_dropped, dropout_left_on]),
    (
        optimizers_are_the_papers,
        [
            _optimizers_with(betas=(0.9, 0.999)),
            _optimizers_with(clip_norm=0.0),
            _optimizers_with(clip_norm=1.0),
            _optimizers_with(learning_rate=2e-3),
        ],
    ),
    (each_attribute_reads_its_own_logits, [logits_sliced_by_attribute_number]),
    (attribute_losses_are_summed, [losses_averaged_over_attributes]),
    (decoding_obeys_the_code_it_is_given, [decoded_with_the_original_labels]),
    (reconstruction_is_a_mean_over_pixels_in_both_directions_of_grey, [summed_over_pixels, measured_on_0_to_1]),
]


@pytest.mark.parametrize("check", [check for check, _ in DEFECTS], ids=lambda check: check.__name__)
def test_our_code_passes(check):
    check()


@pytest.mark.parametrize(
    "check, plant",
    [
        pytest.param(check, plant, id=f"{check.__name__}-{plant.__name__}{number}")
        for check, plants in DEFECTS
        for number, plant in enumerate(plants)
    ],
)
def test_the_check_fails_on_the_defect(check, plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
