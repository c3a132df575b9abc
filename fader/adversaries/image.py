"""The adversary that makes edits visible: one discriminator of images, which also reads their attributes."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fader.adversaries.adversary import Adversary, AdversarySettings, Autoencoder, Targets, View
from fader.adversaries.sight import SightSettings, seen
from fader.attributes import Attributes, one_changed
from fader.counts import LabelCounts
from fader.losses.adversarial import GAMES, r1_penalties
from fader.losses.attributes import accuracies, attribute_loss, attribute_losses, log_odds
from fader.method import Batch, Context, Loss, Networks, Optimizer, Phase
from fader.networks.discriminators import ImageDiscriminator
from fader.networks.layers import wide
from fader.settings import setting


@dataclass(frozen=True)
class ImageSettings(AdversarySettings):
    ramp_images: int = setting(0, "images over which the weight rises", least=0)
    warmup_images: int = setting(0, "images before that, in which only the discriminator learns from it", least=0)
    rise: Literal["linear", "cosine", "step", "constant"] = setting("linear", "shape of the rise")
    reading: float = setting(2.0, "of what is asked for, added up over attributes, beside 1 for being taken for real", least=0)
    changed: float = setting(1.0, "what an attribute that is changed counts there, beside 1 for one that stays", least=0)
    emphasis: tuple[float, ...] = setting((), "what each attribute counts there, in the order of the code; none given = 1 each")
    own_reading: float = setting(0.25, "of real images' attributes in the discriminator's own loss", least=0)
    traces: float = setting(0.5, "there, of swaps' old attributes, beside 1 for real images' attributes", least=0)
    one_changed: float = setting(0.7, "share of swaps that change one attribute; others show others' labels", least=0, most=1)
    others: Literal["batch", "uniform"] = setting("batch", "those: another record's of the batch, or drawn evenly")
    game: Literal["non_saturating", "hinge", "relativistic"] = setting("non_saturating", "what real or decoded is worth")
    r1: float = setting(1.0, "γ of the gradient penalty on real images", least=0)
    r1_reading: float = setting(1.0, "of the attributes' log odds in that gradient, beside 1 for real or decoded", least=0)
    r1_every: int = setting(8, "steps from one update with the penalty to the next; it then counts so many times", least=1)
    betas: tuple[float, float] = setting((0.0, 0.99), "of Adam")
    init_channels: int = setting(24, "of the discriminator's first layer; they double with each", least=1)
    max_channels: int = setting(144, "up to so many", least=1)
    hidden_channels: int = setting(256, "of its last hidden layer", least=1)
    sight: SightSettings = setting(SightSettings(), "what it may see of an image")


class ImageAdversary(Adversary):
    """Tells real images from swaps and reads the attributes of both; the autoencoder is asked to pass on both counts.

    The attributes are learnt from real images, and from swaps, of which the discriminator learns the attributes that they had
    before (`traces`): a swap that only a network would take for changed is told from one that shows the new value. Frequencies
    are taken out of the logits, so that a swap is asked to show a rare value as clearly as a common one (Menon et al. 2021,
    arXiv:2007.07314, logit adjustment).
    Source: the classifier and the discriminator share a trunk as in Odena et al. 2017, arXiv:1610.09585, and He et al. 2019,
    "AttGAN", arXiv:1711.10678; the penalty comes every few steps as in Karras et al. 2020, arXiv:1912.04958, appendix B.
    """

    name, network = "image", "image_discriminator"
    settings: ImageSettings

    def __init__(self, settings: ImageSettings, autoencoder: Autoencoder) -> None:
        super().__init__(settings, autoencoder)
        self.emphasis = settings.emphasis or (1.0,) * len(self.attributes)
        if len(self.emphasis) != len(self.attributes):
            raise ValueError(f"emphasis has {len(self.emphasis)} numbers for {len(self.attributes)} attributes")

    @property
    def differentiated_twice(self) -> bool:
        return self.settings.r1 > 0

    def build(self) -> ImageDiscriminator:
        s, layout = self.settings, self.autoencoder.layout
        sizes = (layout.channels, s.init_channels, s.max_channels, s.hidden_channels)
        return ImageDiscriminator(layout.image_size, self.attributes, self.head, *sizes)

    def phases(self) -> tuple[Phase, ...]:
        s = self.settings
        if not s.r1:
            return super().phases()
        penalised = self.phase(self.penalised_loss, every=s.r1_every, name=f"{self.network}_r1")
        return (*super().phases(), dataclasses.replace(penalised, repeat=1))

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        """Return how the discriminator is updated; its learning rate falls when the autoencoder's does."""
        s, base = self.settings, self.autoencoder.optimizer
        rate = base.learning_rate if s.learning_rate is None else s.learning_rate
        return {(self.network,): dataclasses.replace(base, learning_rate=rate, betas=s.betas, ema_half_life=0)}

    def discriminator_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """The discriminator learns to tell real images from swaps, and the attributes of real ones."""
        with torch.no_grad():
            decoded = self.view(networks, batch).swap(self._targets(networks)).images
        discriminator = networks[self.network]
        prior = discriminator.counts.prior(self.attributes, self.head)
        discriminator.counts.add(self.attributes, batch.attributes, context.reduce_sum)
        both = torch.cat([self._seen(batch.images, batch, "real"), self._seen(decoded, batch, "decoded")])
        (real, fake), (logits, old) = (part.chunk(2) for part in discriminator(both))
        given = (self.attributes, wide(logits) + prior, batch.attributes, batch.known, self.head)
        told, reading = batch.mean(GAMES[self.settings.game].discriminator(real, fake)), attribute_loss(*given)
        traces = attribute_loss(self.attributes, wide(old) + prior, batch.attributes, batch.known, self.head)
        report = {"told": told, "reading": reading, "traces": traces, "real": batch.mean(real), "decoded": batch.mean(fake)}
        report |= {f"accuracy.{name}": part for name, part in zip(self.attributes.names, accuracies(*given))}
        report = {f"{self.network}/{name}": value.detach() for name, value in report.items()}
        return Loss(told + self.settings.own_reading * (reading + self.settings.traces * traces), report)

    def penalised_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """The same loss with R1, which is multiplied by the number of steps until it comes again."""
        s, loss = self.settings, self.discriminator_loss(networks, batch, context)
        images = self._seen(batch.images, batch, "real").detach().requires_grad_()
        verdict = networks[self.network](images)
        odds = log_odds(self.attributes, verdict.attributes, batch.attributes, self.head).sum(1)
        penalty = batch.mean(r1_penalties(verdict.real + s.r1_reading * odds, images))
        return Loss(loss.value + s.r1 / 2 * s.r1_every * penalty, {f"{self.network}/r1": penalty.detach()})

    def pressure(self, networks: Networks, view: View, batch: Batch, context: Context) -> Loss:
        """The swap should be taken for real, and read as the attributes that it was decoded with."""
        s, discriminator, swap = self.settings, networks[self.network], view.swap(self._targets(networks))
        verdict, game = discriminator(self._seen(swap.images, batch, "pressed")), GAMES[s.game]
        real = discriminator(self._seen(batch.images, batch, "real")).real if game.compares else verdict.real
        taken = batch.mean(game.maker(real, verdict.real))
        counts = torch.where(swap.labels == batch.attributes, 1.0, s.changed)
        everyone = batch.size.expand_as(batch.known)
        each = attribute_losses(self.attributes, verdict.attributes, swap.labels, everyone, self.head, counts)
        reading = sum(much * loss for much, loss in zip(self.emphasis, each))
        report = {"taken": taken.detach(), "reading": reading.detach()}
        return Loss(context.weights["image"] * (taken + s.reading * reading), report)

    def _targets(self, networks: Networks) -> Targets:
        return partial(self.targets, networks[self.network].counts)

    def targets(self, counts: LabelCounts, attributes: Attributes, batch: Batch) -> Tensor:
        """Return the labels of the swaps: one attribute changed, or all labels of another record."""
        changed = one_changed(attributes, batch.attributes, counts.shares(attributes, batch.attributes), batch.draws)
        if self.settings.others == "batch":
            others = batch.attributes[batch.draws.integers("another", len(batch.attributes))]
        else:
            others = attributes.resampled(batch.draws).to(changed.dtype)
        return torch.where(batch.draws.uniform("one", (1,)) < self.settings.one_changed, changed, others)

    def _seen(self, images: Tensor, batch: Batch, name: str) -> Tensor:
        return seen(images, batch.draws, name, self.settings.sight)
