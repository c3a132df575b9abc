"""The conditional GAN: the discriminator reads image and attributes together, and learns which of them belong together.

    discriminator   min over D of E [d(D(x, y), D(G(z, y), y)) + d(D(x, y), D(x, y'))] / 2

x are images, y their labels, y' labels that are wrong in one attribute, z is noise, and d is the discriminator's side of the
game. With the logarithms of the non-saturating game these are the weights 1, 1/2 and 1/2 of the authors' code.
Source: Mirza, Osindero 2014, arXiv:1411.1784; networks and wrong labels as in Perarnau et al. 2016, arXiv:1611.06355
(Guim3/IcGAN, there with labels of another record).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fader.attributes import Attributes, one_changed
from fader.losses.adversarial import Game
from fader.method import Batch, Context, Loss, Networks, register
from fader.methods.gan import Gan, GanSettings
from fader.networks.generator import ConditionalDiscriminator, Generator, begin_as_dcgan
from fader.networks.quantisation import Quantisation
from fader.networks.spectral import with_spectral_norm
from fader.settings import setting


@dataclass(frozen=True)
class CGanSettings(GanSettings):
    wrong_labels: float = setting(0.5, "share of real images with wrong labels in what counts as not real", least=0, most=1)


@register
class CGan(Gan):
    """Networks: generator, discriminator."""

    name = "cgan"
    Settings = CGanSettings

    def build(self) -> dict[str, nn.Module]:
        s, attributes = self.settings, self.attributes
        sizes = (self.image_size, self.channels, s.init_channels, s.max_channels)
        discriminator = ConditionalDiscriminator(attributes, *sizes, None if s.spectral_norm else s.norm)
        begin_as_dcgan(discriminator)
        if s.quantised_keys:
            second = discriminator.layers[0].conv
            discriminator.layers.insert(1, Quantisation(second.out_channels, s.quantised_keys, s.quantised_decay))
        return {
            "generator": begin_as_dcgan(Generator(attributes, s.noise_width, *sizes, s.deconv, s.norm, s.dropout)),
            "discriminator": with_spectral_norm(discriminator) if s.spectral_norm else discriminator,
        }

    def verdict(self, networks: Networks, images: Tensor, labels: Tensor) -> Tensor:
        return networks["discriminator"](images, self.attributes.code(labels))

    def discriminator_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        images, cost = self.made(networks, batch, judging=True)
        loss = matching_loss(networks["discriminator"], self.game, self.attributes, batch, [images], self.settings.wrong_labels)
        return Loss(loss.value + cost + self.quantised(networks, batch), loss.report)


def matching_loss(
    discriminator: nn.Module, game: Game, attributes: Attributes, batch: Batch, made: Sequence[Tensor], wrong_labels: float
) -> Loss:
    """What a conditional discriminator minimises: real images with their labels are real, all else is not.
    A record whose wrong labels are not known to be wrong is compared with made images only.
    made: images [N, C, S, S] that are not real, each with the batch's labels.
    wrong_labels: share of the comparisons with real images whose labels are wrong, the rest is with made ones."""
    code = attributes.code(batch.attributes)
    fakes = [discriminator(images, code) for images in made]
    real = discriminator(batch.images, code)
    losses = sum(game.discriminator(real, fake) for fake in fakes) / len(fakes)
    report = {"real": batch.mean(real), "made": sum(batch.mean(fake) for fake in fakes) / len(fakes)}
    if wrong_labels:
        labels = one_changed(attributes, batch.attributes, torch.ones_like(batch.attributes), batch.draws)
        wrong = discriminator(batch.images, attributes.code(labels))
        share = wrong_labels * (labels != batch.attributes).any(1)
        losses = torch.lerp(losses, game.discriminator(real, wrong), share.to(losses.dtype))
        report["wrong"] = batch.mean(wrong)
    loss = batch.mean(losses)
    return Loss(loss, {f"discriminator/{name}": value.detach() for name, value in {"loss": loss, **report}.items()})
