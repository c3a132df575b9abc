"""The conditional VAE: encoder and decoder both read the attributes, and the latent between them is nearly noise.

    encoder+decoder   min over E, D of E [‖D(z, y) - x‖² + β KL(N(μ, σ²) ‖ N(0, 1))]
    where             (μ, σ) = E(x, y), z = μ + σ ε

x are images, y their labels, ε is noise. The first term is a mean over pixels, the second a sum over the latent's numbers. A
picture is made by decoding noise with any labels, and edited by decoding its μ with other labels.
Source: Sohn et al. 2015, "Learning structured output representation using deep conditional generative models"; settings as in
AntixK/PyTorch-VAE (configs/cvae.yaml), whose decoder begins at 2×2 and ends in a further convolution.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fader.losses.latents import gaussian_divergences
from fader.losses.reconstruction import squared_errors
from fader.method import Batch, Context, Loss, Method, Networks, Optimizer, Phase, Stage, register
from fader.networks.encoders import Posterior, VariationalEncoder
from fader.networks.generator import Generator
from fader.networks.layers import Deconv, wide
from fader.settings import Settings, setting


@dataclass(frozen=True)
class CvaeSettings(Settings):
    images: int = setting(2_000_000, "length of training; published: 10 epochs", least=1)
    latent_width: int = setting(128, "numbers of the latent", least=1)
    kl_weight: float = setting(0.00025, "β, of the latent's divergence from noise", least=0)
    init_channels: int = setting(32, "of the maps nearest to the image; they double layer by layer", least=1)
    max_channels: int = setting(512, "up to so many", least=1)
    deconv: Deconv = setting("convtranspose", "how the decoder doubles the sides")
    dropout: float = setting(0.0, "in the decoder", least=0, most=1)
    norm: Literal["global", "local"] = setting("global", "of whose statistics: the global batch's, or this rank's share's")
    learning_rate: float = setting(1e-3, "of Adam; published: 5e-3, which falls by 5 % an epoch", least=0)
    betas: tuple[float, float] = setting((0.9, 0.999), "of Adam")
    clip_norm: float = setting(5.0, "largest L2 norm of all gradients of one trained group; 0 = no clipping", least=0)
    decay_from: int = setting(0, "images after which the learning rate begins to fall", least=0)
    decay_images: int = setting(0, "images within which it then falls to 0, in a straight line; 0 = it does not fall", least=0)
    ema_half_life: int = setting(0, "of the moving average of encoder and decoder, in images; 0 = none", least=0)


@register
class Cvae(Method):
    """Networks: encoder, decoder."""

    name = "cvae"
    Settings = CvaeSettings
    for_use = ("encoder", "decoder")

    def build(self) -> dict[str, nn.Module]:
        s = self.settings
        sizes = (self.attributes, s.latent_width, self.image_size, self.channels, s.init_channels, s.max_channels)
        encoder = VariationalEncoder(*sizes, s.norm)
        return {"encoder": encoder, "decoder": Generator(*sizes, s.deconv, s.norm, s.dropout)}

    @property
    def noise_width(self) -> int:
        return self.settings.latent_width

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("cvae", (Phase(("encoder", "decoder"), self.autoencoder_loss),), self.settings.images),)

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        return {("encoder", "decoder"): Optimizer.of(self.settings)}

    def encoded(self, networks: Networks, batch: Batch) -> tuple[Posterior, Tensor]:
        """The distribution of the batch's latents, and one latent drawn from each."""
        posterior = networks["encoder"](batch.images, self.attributes.code(batch.attributes))
        return posterior, posterior.at(batch.draws.normal("posterior", (self.noise_width,)))

    def autoencoder_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        posterior, latent = self.encoded(networks, batch)
        decoded = networks["decoder"](latent, self.attributes.code(batch.attributes))
        mse = batch.mean(squared_errors(decoded, batch.images))
        divergence = batch.mean(gaussian_divergences(*posterior))
        report = {"autoencoder/mse": mse.detach(), "autoencoder/kl": divergence.detach()}
        return Loss(mse + self.settings.kl_weight * divergence, report)

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images [N, C, S, S] and their labels [N, A] to the means of their latents [N, latent_width]."""
        return self.networks["encoder"](images, self.attributes.code(labels)).mean

    def decode(self, latent: Tensor, code: Tensor) -> Tensor:
        return wide(self.networks["decoder"](latent, code))

    def sample(self, noise: Tensor, code: Tensor) -> Tensor:
        return self.decode(noise, code)
