"""What all GANs here share: a generator that makes images of noise and attributes, and a discriminator that it must please."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fader.losses.adversarial import GAMES, Game
from fader.losses.latents import natural_steps
from fader.method import Batch, Context, Loss, Method, Networks, Optimizer, Phase, Stage
from fader.networks.layers import Deconv, wide
from fader.networks.quantisation import taken_costs
from fader.settings import Settings, setting


@dataclass(frozen=True)
class GanSettings(Settings):
    images: int = setting(4_500_000, "length of training", least=1)
    noise_width: int = setting(100, "numbers of noise, each from N(0, 1)", least=1)
    game: Literal["non_saturating", "hinge", "relativistic"] = setting("non_saturating", "what real or made is worth")
    discriminator_steps: int = setting(1, "updates of the discriminator in each step", least=1)
    init_channels: int = setting(64, "of the maps nearest to the image; they double layer by layer", least=1)
    max_channels: int = setting(512, "up to so many", least=1)
    deconv: Deconv = setting("convtranspose", "how the generator doubles the sides")
    dropout: float = setting(0.0, "in the generator", least=0, most=1)
    norm: Literal["global", "local"] = setting("global", "of whose statistics: the global batch's, or this rank's share's")
    spectral_norm: bool = setting(False, "of the discriminator's convolutions, which then have no batch norm")
    others: Literal["eval", "train"] = setting("train", "mode of the networks that a phase does not train")
    learning_rate: float = setting(2e-4, "of the generator", least=0)
    discriminator_learning_rate: float | None = setting(None, "none = the generator's; another makes two time scales", least=0)
    betas: tuple[float, float] = setting((0.5, 0.999), "of Adam")
    clip_norm: float = setting(0.0, "largest L2 norm of all gradients of one trained group; 0 = no clipping", least=0)
    ema_half_life: int = setting(0, "of the moving average of the generator, in images; 0 = none", least=0)
    latent_step: float = setting(0.0, "α of latent optimisation, see `natural_steps`; 0 = none", least=0)
    latent_damping: float = setting(0.1, "β of it", least=1e-6)
    latent_share: float = setting(0.8, "share of the noise that takes the step", least=0, most=1)
    latent_weight: float = setting(0.1, "of the steps' squared lengths in the losses of both sides", least=0)
    quantised_keys: int = setting(0, "K of the quantisation of what the discriminator's second layer gives; 0 = none", least=0)
    quantised_decay: float = setting(0.8, "γ of it", least=0, most=1)
    quantised_weight: float = setting(1.0, "of features' distances from keys in the losses of both sides", least=0)


class Gan(Method):
    """Base of the GANs. Subclasses build `generator` and `discriminator`, and say how the discriminator judges and learns.

        generator   min over G of E m(D(x, y), D(G(z, y), y))

    m is the maker's side of the game (`fader/losses/adversarial.py`), x are images, y their labels, z is noise. With latent
    optimisation z first takes a step along which the discriminator finds the image more real, and both losses are taken of
    the image that it then gives, the step's own derivatives included. With feature quantisation both losses also have the cost
    of the features that the discriminator's keys stand for.
    """

    for_use = ("generator",)
    settings: GanSettings

    @property
    def noise_width(self) -> int:
        return self.settings.noise_width

    @property
    def game(self) -> Game:
        return GAMES[self.settings.game]

    @property
    def compares(self) -> bool:
        """The generator's losses depend on real images, too."""
        return self.settings.game in GAMES and self.game.compares

    def verdict(self, networks: Networks, images: Tensor, labels: Tensor) -> Tensor:
        """The discriminator's logits [N] of images beside labels [N, A]."""
        raise NotImplementedError

    def discriminator_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        raise NotImplementedError

    def noise(self, batch: Batch) -> Tensor:
        return batch.draws.normal("noise", (self.noise_width,))

    def realness(self, verdicts: Tensor) -> Tensor:
        """[N]: how real verdicts say that images are."""
        return verdicts

    def made(self, networks: Networks, batch: Batch, judging: bool = False) -> tuple[Tensor, Tensor]:
        """Images of the batch's noise with its labels; and what the steps of latent optimisation cost.
        judging: the discriminator will learn from them, so that no gradient goes back to the generator."""
        s, noise, code = self.settings, self.noise(batch), self.attributes.code(batch.attributes)
        if not s.latent_step:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not judging):
                return networks["generator"](noise, code), noise.new_zeros(())
        noise = noise.to(next(networks["generator"].parameters()).dtype).requires_grad_()
        verdicts = self.verdict(networks, networks["generator"](noise, code), batch.attributes)
        (gradient,) = torch.autograd.grad(wide(self.realness(verdicts)).sum(), noise, create_graph=True)
        chosen = batch.draws.uniform("optimised", (1,)) < s.latent_share
        steps = torch.where(chosen, natural_steps(gradient, s.latent_step, s.latent_damping), 0.0)
        cost = s.latent_weight * batch.mean(steps.square().sum(1))
        return networks["generator"](noise + steps, code), cost

    def generator_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        images, cost = self.made(networks, batch)
        taken = self.taken(networks, images, batch)
        return Loss(taken + cost + self.quantised(networks, batch), {"generator/taken": taken.detach()})

    def quantised(self, networks: Networks, batch: Batch) -> Tensor | float:
        """What the discriminator's passes of this update cost by feature quantisation, summed over them."""
        costs = taken_costs(networks["discriminator"])
        return self.settings.quantised_weight * batch.mean(torch.cat(costs)) if costs else 0.0

    def taken(self, networks: Networks, images: Tensor, batch: Batch) -> Tensor:
        fake = self.verdict(networks, images, batch.attributes)
        real = self.verdict(networks, batch.images, batch.attributes) if self.game.compares else fake
        return batch.mean(self.game.maker(real, fake))

    def stages(self) -> tuple[Stage, ...]:
        s = self.settings
        discriminator = Phase(("discriminator",), self.discriminator_loss, others=s.others, repeat=s.discriminator_steps)
        source = "images" if self.compares else "labels"
        generator = Phase(("generator",), self.generator_loss, source, others=s.others)
        return (Stage("gan", (discriminator, generator), s.images),)

    def differentiated_twice(self) -> tuple[str, ...]:
        """Latent optimisation moves the noise along a gradient through both networks."""
        return ("generator", "discriminator") if self.settings.latent_step else ()

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        generator = Optimizer.of(self.settings)
        return {("discriminator",): self._judging_optimizer(), ("generator",): generator}

    def _judging_optimizer(self) -> Optimizer:
        s, rate = self.settings, self.settings.discriminator_learning_rate
        return Optimizer(learning_rate=s.learning_rate if rate is None else rate, betas=s.betas, clip_norm=s.clip_norm)

    def sample(self, noise: Tensor, code: Tensor) -> Tensor:
        return wide(self.networks["generator"](noise, code))
