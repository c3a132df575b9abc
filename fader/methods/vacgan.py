"""VAC+GAN: a classifier stands beside the discriminator, and the generator must please both.

    discriminator   min over D of E d(D(x), D(G(z, y)))
    classifier      min over C of E CE(C(x), y)
    generator       min over G of E [m(D(x), D(G(z, y))) + λ CE(C(G(z, y)), y)]

x are images, y their labels, z is noise, d and m are the sides of the game, CE is cross-entropy. The discriminator sees no
labels. The classifier learns from real images only, with targets of 1 - s for attributes that are present.
Source: Bazrafkan, Corcoran 2018, arXiv:1806.07751; networks and settings as in the document "Generate Faces with Specific
Attributes" (Said, Colagrande), which takes the two terms of the generator in two steps of Adam, one after the other.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fader.counts import LabelCounts
from fader.losses.adversarial import multi_hinges
from fader.losses.attributes import accuracies, attribute_losses, smoothed
from fader.method import Batch, Context, Loss, Networks, Optimizer, Phase, Stage, register
from fader.methods.gan import Gan, GanSettings
from fader.networks.generator import widths_of
from fader.networks.layers import Deconv
from fader.networks.pooled import DenseGenerator, PooledClassifier
from fader.networks.quantisation import Quantisation
from fader.networks.spectral import with_spectral_norm
from fader.settings import setting

MOST_CLASSES = 4_096


@dataclass(frozen=True)
class VacGanSettings(GanSettings):
    images: int = setting(2_500_000, "length of training; published: 25 epochs of 101,200", least=1)
    # multi_hinge: the discriminator also says which attributes a real image has
    game: Literal["non_saturating", "hinge", "relativistic", "multi_hinge"] = setting("hinge", "what real or made is worth")
    discriminator_steps: int = setting(2, "updates of discriminator and classifier in each step", least=1)
    init_channels: int = setting(32, "of the discriminator's first layer; generator and classifier have twice as many", least=1)
    max_channels: int = setting(256, "they double up to so many; the classifier's up to twice as many", least=1)
    hidden_channels: int = setting(2048, "of the generator's first dense layer", least=1)
    deconv: Deconv = setting("upsampling", "how the generator doubles the sides")
    dropout: float = setting(0.2, "after the generator's dense layers", least=0, most=1)
    spectral_norm: bool = setting(True, "of the convolutions of all three networks")
    others: Literal["eval", "train"] = setting("eval", "mode of the networks that a phase does not train")
    learning_rate: float = setting(5e-5, "of the generator", least=0)
    discriminator_learning_rate: float | None = setting(2e-4, "of discriminator and classifier; none = the generator's", least=0)
    betas: tuple[float, float] = setting((0.0, 0.999), "of Adam")
    classifier_weight: float = setting(1.0, "λ, of the mean over attributes of the generator's cross-entropy", least=0)
    even_labels: bool = setting(False, "in both cross-entropies rare values of an attribute count for as much as common ones")
    label_smoothing: float = setting(0.1, "s: the target of a present attribute is 1 - s", least=0, most=1)


@register
class VacGan(Gan):
    """Networks: generator, discriminator, classifier."""

    name = "vacgan"
    Settings = VacGanSettings

    def build(self) -> dict[str, nn.Module]:
        s, attributes, channels = self.settings, self.attributes, self.channels
        if self.counts_classes and self.classes > MOST_CLASSES:
            have = f"{len(attributes)} attributes have {self.classes:,}; name fewer"
            raise ValueError(f"game multi_hinge takes combinations as classes: {have} (at most {MOST_CLASSES:,} classes)")
        widths = widths_of(self.image_size, s.init_channels, s.max_channels)
        up = widths_of(self.image_size, 2 * s.init_channels, max(2 * s.init_channels, s.max_channels))[-2::-1]
        generator = (attributes, s.noise_width, up, channels, s.hidden_channels, s.deconv, s.norm, s.dropout)
        logits = attributes.logits_width("sigmoid")
        networks = {
            "generator": DenseGenerator(*generator),
            "discriminator": PooledClassifier(channels, widths, 5, None, 1 + (self.classes if self.counts_classes else 0)),
            "classifier": PooledClassifier(channels, [2 * width for width in widths], 2, s.norm, logits),
        }
        if s.quantised_keys:  # convolution, LeakyReLU, convolution, LeakyReLU, and here
            networks["discriminator"].layers.insert(4, Quantisation(widths[1], s.quantised_keys, s.quantised_decay))
        if s.spectral_norm:
            networks = {name: with_spectral_norm(network) for name, network in networks.items()}
        return networks | ({"label_counts": LabelCounts(attributes)} if s.even_labels else {})

    @property
    def counts_classes(self) -> bool:
        return self.settings.game == "multi_hinge"

    @property
    def classes(self) -> int:
        """K: combinations of the attributes' values."""
        return math.prod(attribute.k for attribute in self.attributes)

    def verdict(self, networks: Networks, images: Tensor, labels: Tensor) -> Tensor:
        """The discriminator's logits of images: [N], or of each class and of none, [N, K + 1]."""
        logits = networks["discriminator"](images)
        return logits if self.counts_classes else logits[:, 0]

    def realness(self, verdicts: Tensor) -> Tensor:
        return -verdicts[:, -1] if self.counts_classes else verdicts

    def taken(self, networks: Networks, images: Tensor, batch: Batch) -> Tensor:
        if not self.counts_classes:
            return super().taken(networks, images, batch)
        verdicts = self.verdict(networks, images, batch.attributes)
        return batch.mean(multi_hinges(verdicts, self.attributes.joint(batch.attributes)))

    def discriminator_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        images, cost = self.made(networks, batch, judging=True)
        both = torch.cat([batch.images, images.to(batch.images.dtype)])
        real, fake = self.verdict(networks, both, batch.attributes).chunk(2)
        if self.counts_classes:
            none = torch.full_like(batch.index, self.classes)
            losses = multi_hinges(real, self.attributes.joint(batch.attributes)) + multi_hinges(fake, none)
        else:
            losses = self.game.discriminator(real, fake)
        loss = batch.mean(losses)
        report = {"loss": loss, "real": batch.mean(self.realness(real)), "made": batch.mean(self.realness(fake))}
        value = loss + cost + self.quantised(networks, batch)
        return Loss(value, {f"discriminator/{name}": value.detach() for name, value in report.items()})

    def classifier_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        logits = networks["classifier"](batch.images)
        if self.settings.even_labels:
            networks["label_counts"].add(self.attributes, batch.attributes, context.reduce_sum)
        loss = self.reading(networks, logits, smoothed(self.attributes, batch.attributes, self.settings.label_smoothing), batch)
        right = accuracies(self.attributes, logits, batch.attributes, batch.known, "sigmoid")
        report = {f"classifier/accuracy.{name}": part for name, part in zip(self.attributes.names, right)}
        return Loss(loss, {"classifier/loss": loss.detach(), **report})

    def reading(self, networks: Networks, logits: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of the classifier's logits, a mean over attributes."""
        weights = 1 / networks["label_counts"].shares(self.attributes, batch.attributes) if self.settings.even_labels else None
        return attribute_losses(self.attributes, logits, labels, batch.known, "sigmoid", weights).sum() / len(self.attributes)

    def generator_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        images, cost = self.made(networks, batch)
        taken, logits = self.taken(networks, images, batch), networks["classifier"](images)
        reading = self.reading(networks, logits, batch.attributes, batch)
        report = {"generator/taken": taken.detach(), "generator/reading": reading.detach()}
        value = taken + self.settings.classifier_weight * reading + cost + self.quantised(networks, batch)
        return Loss(value, report)

    def stages(self) -> tuple[Stage, ...]:
        s, (gan,) = self.settings, super().stages()
        discriminator, generator = gan.phases
        counts = ("label_counts",) if s.even_labels else ()
        classifier = Phase(("classifier",), self.classifier_loss, others=s.others, repeat=s.discriminator_steps, observers=counts)
        return (Stage("vacgan", (discriminator, classifier, generator), s.images),)

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        return {("classifier",): self._judging_optimizer(), **super().optimizers()}
