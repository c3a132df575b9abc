"""The published adversary: a discriminator looks for the attributes in the latent, and the encoder learns to fool it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fader.adversaries.adversary import Adversary, AdversarySettings, Autoencoder, View
from fader.adversaries.solved import SolvedAdversary
from fader.losses.attributes import fool_loss
from fader.method import Batch, Context, Loss, Networks, Phase
from fader.networks.discriminators import LatentDiscriminator
from fader.schedules import Rise
from fader.settings import setting


@dataclass(frozen=True)
class LatentSettings(AdversarySettings):
    weight: float = setting(1e-4, "λ_E of the paper, once it has risen", least=0)
    ramp_images: int = setting(16_000_000, "images over which λ_E rises; published: 500,000 iterations of 32", least=0)
    warmup_images: int = setting(0, "images before that, in which λ_E is 0 and only reconstruction is learnt", least=0)
    rise: Rise = setting("linear", "shape of the rise: linear as published, cosine, step (all at its end) or constant")
    steps: int = setting(1, "updates of the discriminator in each step; 0 = there is no latent adversary", least=0)
    dropout: float = setting(0.3, "in the discriminator's convolutions", least=0, most=1)
    hidden_channels: int = setting(512, "of the discriminator's last hidden layer", least=1)


class LatentAdversary(Adversary):
    """Reads the attributes off the latent; the encoder learns to leave it nothing to read.
    observers: they take note of the batches that the discriminator learns from.
    Source: Lample et al. 2017, arXiv:1706.00409, equations 2 and 3."""

    name, network = "latent", "latent_discriminator"
    settings: LatentSettings

    def __init__(self, settings: LatentSettings, autoencoder: Autoencoder, observers: Sequence[SolvedAdversary] = ()) -> None:
        super().__init__(settings, autoencoder)
        self.observers = observers

    def build(self) -> LatentDiscriminator:
        s, width = self.settings, self.attributes.logits_width(self.head)
        return LatentDiscriminator(self.autoencoder.layout, width, s.hidden_channels, s.dropout, self.autoencoder.norm)

    def phases(self) -> tuple[Phase, ...]:
        return (self.phase(self.discriminator_loss, observers=tuple(observer.network for observer in self.observers)),)

    def discriminator_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """Equation 2: the discriminator learns to read the attributes off the latent. The encoder does not move."""
        with torch.no_grad():
            view = self.view(networks, batch)
        for observer in self.observers:
            observer.note(networks, view, batch, context)
        return self.recognition(networks["latent_discriminator"](view.latent), batch)

    def pressure(self, networks: Networks, view: View, batch: Batch, context: Context) -> Loss:
        """Second term of equation 3: the encoder leads the discriminator to the opposite labels, with weight λ_E."""
        logits, weight = networks["latent_discriminator"](view.latent), context.weights["latent"]
        fool = fool_loss(self.attributes, logits, batch.attributes, batch.known, batch.draws, self.head)
        return Loss(weight * fool, {"fool": fool.detach(), "lambda": weight.clone()})
