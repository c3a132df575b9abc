"""The published discriminator of images: it tells patches of real images from patches of decoded ones."""

from dataclasses import dataclass

import torch

from fader.adversaries.adversary import Adversary, AdversarySettings, View
from fader.losses.adversarial import patch_losses, patch_probabilities
from fader.method import Batch, Context, Loss, Networks
from fader.networks.discriminators import PatchDiscriminator
from fader.settings import setting


@dataclass(frozen=True)
class PatchSettings(AdversarySettings):
    smooth_label: float = setting(0.2, "the targets are this for decoded and one minus this for real images", least=0, most=0.5)


class PatchAdversary(Adversary):
    """Tells patches of real images from patches of swaps.
    Source: the option `lambda_ptc_dis` of facebookresearch/FaderNetworks."""

    name, network = "patch", "patch_discriminator"
    settings: PatchSettings

    def build(self) -> PatchDiscriminator:
        layout = self.autoencoder.layout
        sizes = (layout.channels, layout.init_channels, layout.max_channels, self.autoencoder.norm)
        return PatchDiscriminator(layout.image_size, *sizes)

    def discriminator_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        with torch.no_grad():
            decoded = self.view(networks, batch).swap().images
        real = patch_probabilities(networks["patch_discriminator"](batch.images))
        fake = patch_probabilities(networks["patch_discriminator"](decoded))
        smooth = self.settings.smooth_label
        loss = batch.mean(patch_losses(real, 1 - smooth)) + batch.mean(patch_losses(fake, smooth))
        report = {"loss": loss, "real": batch.mean(real), "decoded": batch.mean(fake)}
        return Loss(loss, {f"patch_discriminator/{name}": value.detach() for name, value in report.items()})

    def pressure(self, networks: Networks, view: View, batch: Batch, context: Context) -> Loss:
        real = patch_probabilities(networks["patch_discriminator"](view.swap().images))
        loss = batch.mean(patch_losses(real, 1 - self.settings.smooth_label))
        return Loss(context.weights["patch"] * loss, {"patch": loss.detach()})
