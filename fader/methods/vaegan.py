"""The VAE-GAN: a conditional VAE that reconstructs what a discriminator sees of an image, and must please the discriminator.

    discriminator     min over P of E [(d(P(x, y), P(x̃, y)) + d(P(x, y), P(x_p, y))) / 2 + d(P(x, y), P(x, y'))] / 2
    encoder+decoder   min over E, D of E [λ_x ‖x̃ - x‖² + λ_f ‖f(x̃, y) - f(x, y)‖² + β KL
                                          + λ_P (m(P(x̃', y)) + m(P(x_p, y))) / 2]

x are images, y their labels, y' labels that are wrong in one attribute, x̃ = D(z, y) reconstructions, x_p = D(ε, y) images of
noise, f the features that the discriminator's last layer reads (a mean over them), d and m the sides of the game. x̃' is x̃
without a gradient to the encoder, which learns from the other terms alone.
Source: Larsen et al. 2016, arXiv:1512.09300, algorithm 1, there without labels and without the pixels' error (λ_x = 0).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fader.losses.adversarial import GAMES
from fader.losses.latents import gaussian_divergences
from fader.losses.reconstruction import squared_errors
from fader.method import Batch, Context, Loss, Networks, Optimizer, Phase, Stage, register
from fader.methods.cgan import matching_loss
from fader.methods.cvae import Cvae, CvaeSettings
from fader.networks.generator import ConditionalDiscriminator
from fader.networks.layers import wide
from fader.networks.spectral import with_spectral_norm
from fader.settings import setting


@dataclass(frozen=True)
class VaeGanSettings(CvaeSettings):
    learning_rate: float = setting(3e-4, "of all networks; published: RMSProp with 3e-4", least=0)
    betas: tuple[float, float] = setting((0.5, 0.999), "of Adam")
    pixel_weight: float = setting(1.0, "λ_x", least=0)
    feature_weight: float = setting(0.1, "λ_f", least=0)
    discriminator_weight: float = setting(0.01, "λ_P", least=0)
    game: Literal["non_saturating", "hinge"] = setting("non_saturating", "what real or made is worth")
    wrong_labels: float = setting(0.5, "share of real images with wrong labels in what counts as not real", least=0, most=1)
    spectral_norm: bool = setting(False, "of the discriminator's convolutions, which then have no batch norm")
    others: Literal["eval", "train"] = setting("train", "mode of the networks that a phase does not train")


@register
class VaeGan(Cvae):
    """Networks: encoder, decoder, discriminator."""

    name = "vaegan"
    Settings = VaeGanSettings

    def build(self) -> dict[str, nn.Module]:
        s, networks = self.settings, super().build()
        sizes = (self.image_size, self.channels, s.init_channels, s.max_channels)
        discriminator = ConditionalDiscriminator(self.attributes, *sizes, None if s.spectral_norm else s.norm)
        return networks | {"discriminator": with_spectral_norm(discriminator) if s.spectral_norm else discriminator}

    def stages(self) -> tuple[Stage, ...]:
        s = self.settings
        discriminator = Phase(("discriminator",), self.discriminator_loss, others=s.others)
        autoencoder = Phase(("encoder", "decoder"), self.autoencoder_loss, others=s.others)
        return (Stage("vaegan", (discriminator, autoencoder), s.images),)

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        s = self.settings
        discriminator = Optimizer(learning_rate=s.learning_rate, betas=s.betas, clip_norm=s.clip_norm)
        return {("discriminator",): discriminator, **super().optimizers()}

    def _decoded(self, networks: Networks, batch: Batch, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions and images of noise, by one pass of the decoder."""
        noise, code = batch.draws.normal("noise", (self.noise_width,)), self.attributes.code(batch.attributes)
        decoded = networks["decoder"](torch.cat([latent, noise.to(latent.dtype)]), torch.cat([code, code]))
        return decoded.tensor_split(2)

    def discriminator_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        with torch.no_grad():
            made = self._decoded(networks, batch, self.encoded(networks, batch)[1])
        s = self.settings
        return matching_loss(networks["discriminator"], GAMES[s.game], self.attributes, batch, made, s.wrong_labels)

    def autoencoder_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        s, discriminator, code = self.settings, networks["discriminator"], self.attributes.code(batch.attributes)
        posterior, latent = self.encoded(networks, batch)
        decoded = networks["decoder"](latent, code)
        features = [wide(discriminator.features(images, code)) for images in (decoded, batch.images)]
        verdicts = [discriminator(images, code) for images in self._decoded(networks, batch, latent.detach())]
        parts = {
            "mse": batch.mean(squared_errors(decoded, batch.images)),
            "features": batch.mean(squared_errors(*features)),
            "kl": batch.mean(gaussian_divergences(*posterior)),
            "taken": batch.mean(sum(GAMES[s.game].maker(verdict, verdict) for verdict in verdicts) / len(verdicts)),
        }
        weights = (s.pixel_weight, s.feature_weight, s.kl_weight, s.discriminator_weight)
        loss = sum(weight * part for weight, part in zip(weights, parts.values()))
        return Loss(loss, {f"autoencoder/{name}": part.detach() for name, part in parts.items()})
