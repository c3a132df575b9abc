"""The invertible conditional GAN: a conditional GAN, and encoders that say of which noise and attributes an image is made.

    gan         as in fader/methods/cgan.py
    statistics  batch norm's statistics of the generator are refreshed; no weight moves
    encoder_z   min over E_z of E ‖z - E_z(G(z, y))‖²   on made images
    encoder_y   min over E_y of E ‖y - E_y(x)‖²         on real images, y in {-1, 1}

Variants: "ind" has two encoders; "ind_cond" has two, and E_z reads what E_y says beside the image, so that E_y learns first;
"sng" has one encoder with two heads. An image is edited by G(E_z(x), y).
Source: Perarnau et al. 2016, arXiv:1611.06355, sections 3 and 4; settings as in Guim3/IcGAN.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fader.losses.attributes import condition_loss
from fader.method import Batch, Context, Loss, Networks, Optimizer, Phase, Stage, register
from fader.methods.cgan import CGan, CGanSettings
from fader.networks.encoders import InvertingEncoder
from fader.networks.layers import wide
from fader.settings import setting


@dataclass(frozen=True)
class IcGanSettings(CGanSettings):
    variant: Literal["ind", "ind_cond", "sng"] = setting("ind", "two encoders, two of which E_z reads E_y's answer, or one")
    statistics_share: float = setting(0.0015, "length of the second stage, beside the GAN's; published: 100 batches", least=0)
    encoder_share: float = setting(0.6, "length of each encoder's stage, beside the GAN's; published: 15 epochs for 25", least=0)
    hidden_channels: int = setting(4096, "of the hidden layer before z; the one before y has an eighth", least=1)
    encoder_learning_rate: float = setting(1e-4, "of the encoders", least=0)
    encoder_betas: tuple[float, float] = setting((0.1, 0.999), "of the encoders' Adam")


@register
class IcGan(CGan):
    """Networks: generator, discriminator, and encoder_z and encoder_y, or encoder."""

    name = "icgan"
    Settings = IcGanSettings

    def build(self) -> dict[str, nn.Module]:
        s, networks = self.settings, super().build()
        width = networks["generator"].condition.width
        half = [max(1, number // 2) for number in (s.init_channels, s.max_channels)]
        heads = {"z": (s.hidden_channels, s.noise_width), "y": (max(8, s.hidden_channels // 8), width)}

        def encoder(*names: str, known_width: int = 0) -> InvertingEncoder:
            return InvertingEncoder({n: heads[n] for n in names}, self.image_size, self.channels, *half, s.norm, known_width)

        if s.variant == "sng":
            return networks | {"encoder": encoder("z", "y")}
        encoder_z = encoder("z", known_width=width if s.variant == "ind_cond" else 0)
        return networks | {"encoder_z": encoder_z, "encoder_y": encoder("y")}

    @property
    def for_use(self) -> tuple[str, ...]:  # type: ignore[override]
        needed = {"sng": ("encoder",), "ind": ("encoder_z",), "ind_cond": ("encoder_z", "encoder_y")}
        return ("generator", *needed[self.settings.variant])

    def stages(self) -> tuple[Stage, ...]:
        s = self.settings
        statistics = Phase((), self.refreshed, "labels", others="train", name="statistics")
        encoders = {
            "encoder": Phase(("encoder",), self.encoder_loss),
            "encoder_z": Phase(("encoder_z",), self.encoder_z_loss, "labels"),
            "encoder_y": Phase(("encoder_y",), self.encoder_y_loss),
        }
        order = {"sng": ("encoder",), "ind": ("encoder_z", "encoder_y"), "ind_cond": ("encoder_y", "encoder_z")}[s.variant]
        lengths = [max(1, round(share * s.images)) for share in (s.statistics_share, s.encoder_share)]
        stages = [Stage(name, (encoders[name],), lengths[1]) for name in order]
        return (*super().stages(), Stage("statistics", (statistics,), lengths[0]), *stages)

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        s = self.settings
        encoder = Optimizer(learning_rate=s.encoder_learning_rate, betas=s.encoder_betas, clip_norm=s.clip_norm)
        return {**super().optimizers(), **{(name,): encoder for name in self.networks if name.startswith("encoder")}}

    def refreshed(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """The generator's running statistics follow its last weights."""
        brightness = batch.mean(wide(self.drawn(networks, batch)).flatten(1).mean(1))
        return Loss(brightness, {"generator/brightness": brightness})

    def drawn(self, networks: Networks, batch: Batch) -> Tensor:
        return networks["generator"](self.noise(batch), self.attributes.code(batch.attributes))

    def encoder_z_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """E_z learns of which noise an image was made; the mean over the noise's numbers."""
        with torch.no_grad():
            images = self.drawn(networks, batch)
        error = batch.mean((self._noise_of(networks, images) - self.noise(batch)).square().mean(1))
        return Loss(error, {"encoder_z/error": error.detach()})

    def encoder_y_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        found = networks["encoder" if "encoder" in networks else "encoder_y"](batch.images)["y"]
        error = condition_loss(self.attributes, found, batch.attributes, batch.known)
        return Loss(error, {"encoder_y/error": error.detach()})

    def encoder_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        z, y = (loss(networks, batch, context) for loss in (self.encoder_z_loss, self.encoder_y_loss))
        return Loss(z.value + y.value, {**z.report, **y.report})

    def _noise_of(self, networks: Networks, images: Tensor) -> Tensor:
        if "encoder" in networks:
            return networks["encoder"](images)["z"]
        known = None
        if self.settings.variant == "ind_cond":
            with torch.no_grad():
                known = networks["encoder_y"](images)["y"]
        return networks["encoder_z"](images, known)["z"]

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images [N, C, S, S] to the noise [N, noise_width] of which they might be made. The labels are not read."""
        return self._noise_of(self.networks, images)

    def decode(self, latent: Tensor, code: Tensor) -> Tensor:
        return self.sample(latent, code)
