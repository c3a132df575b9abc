"""The interface of every adversary, and what an adversary is shown of an autoencoder's work."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from fader.attributes import Attributes, Head
from fader.losses.attributes import accuracies, attribute_loss
from fader.method import Batch, Context, Loss, LossFunction, Networks, Optimizer, Phase
from fader.networks.autoencoder import Latent, Layout
from fader.networks.normalization import Norm
from fader.schedules import Rise, Schedule
from fader.settings import Settings, setting

Mode = Literal["eval", "train"]
Targets = Callable[[Attributes, Batch], Tensor]


@dataclass(frozen=True)
class AdversarySettings(Settings):
    weight: float = setting(0.0, "of its pressure, once it has risen; 0 = there is no such adversary", least=0)
    ramp_images: int | None = setting(None, "images over which the weight rises; none = as the latent adversary's", least=0)
    warmup_images: int | None = setting(None, "images before that, in which it is 0; none = as the latent adversary's", least=0)
    rise: Rise | None = setting(None, "its shape: linear, cosine, step or constant; none = as the latent adversary's")
    steps: int = setting(1, "updates of its network in each step", least=0)
    learning_rate: float | None = setting(None, "of its network; none = the autoencoder's", least=0)


@dataclass(frozen=True)
class Autoencoder:
    """What an adversary must know of the autoencoder that it presses on.

    layout: sizes of encoder and decoder. norm: of the discriminators.
    optimizer: of the autoencoder; an adversary's own takes from it what its settings leave open.
    others: the mode of encoder and decoder while an adversary learns.
    stream: the stream of batches that all phases share; empty where each phase reads its own.
    """

    attributes: Attributes
    head: Head
    layout: Layout
    norm: Norm
    optimizer: Optimizer
    others: Mode
    stream: str


class Swap(NamedTuple):
    """Images decoded with other labels. labels: [N, A]."""

    labels: Tensor
    images: Tensor


def uniform(attributes: Attributes, batch: Batch) -> Tensor:
    """Targets of a swap as published: every attribute drawn anew, evenly over its values."""
    return attributes.resampled(batch.draws)


class View:
    """What an autoencoder makes of a batch. The latent is there at once; the rest is decoded when it is asked for, once."""

    def __init__(self, attributes: Attributes, networks: Networks, batch: Batch) -> None:
        self.attributes, self.batch = attributes, batch
        self.latent: Latent = networks["encoder"](batch.images)
        self._decoder = networks["decoder"]
        self._swaps: dict[Targets, Swap] = {}

    @cached_property
    def reconstruction(self) -> Tensor:
        return self._decoder(self.latent, self.attributes.code(self.batch.attributes))

    def swap(self, targets: Targets = uniform) -> Swap:
        """Return the batch decoded with the labels that `targets` gives."""
        if targets not in self._swaps:
            labels = targets(self.attributes, self.batch)
            self._swaps[targets] = Swap(labels, self._decoder(self.latent, self.attributes.code(labels)))
        return self._swaps[targets]


class Adversary:
    """Presses on an autoencoder: a network of its own, the phases that train it, and what the autoencoder must minimise.
    Subclasses set `name`, which is the key of their settings and of their weight in `Context.weights`, and `network`, the name of
    their network."""

    name: ClassVar[str]
    network: ClassVar[str]
    settings: Any
    differentiated_twice: bool = False  # whether a loss differentiates a gradient of its network again

    def __init__(self, settings: AdversarySettings, autoencoder: Autoencoder) -> None:
        self.settings, self.autoencoder = settings, autoencoder
        self.attributes, self.head = autoencoder.attributes, autoencoder.head

    def build(self) -> nn.Module:
        """Make its network."""
        raise NotImplementedError

    def phases(self) -> tuple[Phase, ...]:
        """Return the updates of its network in each step: by default those by its `discriminator_loss`."""
        return (self.phase(self.discriminator_loss),)

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        """Return how its network is updated: by default as the autoencoder is, but for the learning rate."""
        own, base = self.settings.learning_rate, self.autoencoder.optimizer
        rate = base.learning_rate if own is None else own
        return {(self.network,): dataclasses.replace(base, learning_rate=rate, ema_half_life=0, decay_images=0)}

    def schedule(self) -> Schedule:
        s = self.settings
        return Schedule(s.weight, over=s.ramp_images, after=s.warmup_images, rise=s.rise)

    def pressure(self, networks: Networks, view: View, batch: Batch, context: Context) -> Loss:
        """Return what the autoencoder minimises for this adversary, its weight included. The report names no network."""
        raise NotImplementedError

    def view(self, networks: Networks, batch: Batch) -> View:
        return View(self.attributes, networks, batch)

    def phase(self, loss: LossFunction, **more: Any) -> Phase:
        about = self.autoencoder
        return Phase((self.network,), loss, others=about.others, repeat=self.settings.steps, stream=about.stream, **more)

    def recognition(self, logits: Tensor, batch: Batch) -> Loss:
        """Return the cross-entropy of its logits against the attributes, with its accuracies as the report."""
        given = (self.attributes, logits, batch.attributes, batch.known, self.head)
        loss, right = attribute_loss(*given), accuracies(*given)
        report = {f"{self.network}/accuracy.{name}": part for name, part in zip(self.attributes.names, right)}
        return Loss(loss, {f"{self.network}/loss": loss.detach(), **report})
