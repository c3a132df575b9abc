"""Fader networks: an autoencoder, and a list of adversaries that press on it.

    1  reconstruction   L_AE(E, D)   = E ‖D(E(x), y) - x‖²                           the first term below
    2  discriminator    L_dis(P | E) = -E log P(y | E(x))                            fader/adversaries/latent.py
    3  autoencoder      L(E, D | P)  = E ‖D(E(x), y) - x‖² - λ_E E log P(1 - y | E(x))   `Fader.autoencoder_loss`

x are images, y their labels, E the encoder, D the decoder, P the latent discriminator, and λ_E rises from 0. These are the
paper's equations, and the default list is the paper's: the latent adversary alone. Other recipes are other lists.
Source: Lample et al. 2017, arXiv:1706.00409. Where the paper and the authors' code (facebookresearch/FaderNetworks) differ, the
defaults follow the code.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fader.adversaries.adversary import Adversary, AdversarySettings, Autoencoder, Mode, View
from fader.adversaries.attribute import AttributeAdversary, ClassifierSettings
from fader.adversaries.image import ImageAdversary, ImageSettings
from fader.adversaries.latent import LatentAdversary, LatentSettings
from fader.adversaries.patch import PatchAdversary, PatchSettings
from fader.adversaries.solved import SolvedAdversary, SolvedSettings
from fader.attributes import Head
from fader.losses.reconstruction import absolute_errors, squared_errors
from fader.method import Batch, Context, Loss, Method, Networks, Optimizer, Phase, Stage, register
from fader.networks.autoencoder import PRESETS, Decoder, Encoder, Latent, Layout, Preset, Skip
from fader.networks.layers import Deconv, wide
from fader.networks.normalization import Norm
from fader.schedules import Schedule
from fader.settings import Settings, setting


@dataclass(frozen=True)
class ReconstructionSettings(Settings):
    weight: float = setting(1.0, "of the reconstruction's error", least=0)
    error: Literal["squared", "absolute"] = setting("squared", "mean over pixels; squared as published")


@dataclass(frozen=True)
class FaderSettings(Settings):
    images: int = setting(50_000_000, "length of training, as published; converged after a tenth to a fifth of it", least=0)
    preset: Preset = setting("official", "network sizes; the next three override it where they are given")
    init_channels: int | None = setting(None, "channels after the first layer; they double with each")
    max_channels: int | None = setting(None, "up to so many")
    num_layers: int | None = setting(None, "each halves the sides of the image")
    num_skips: int = setting(0, "encoder maps handed to the decoder beside the latent", least=0)
    skip: Skip = setting("plain", "those maps as they are, or selective: through a gate that knows the attributes")
    deconv: Deconv = setting("convtranspose", "how the decoder doubles the sides")
    last_deconv: Deconv | None = setting(None, "how its last layer does, if in another way")
    norm: Norm = setting("global", "of encoder and decoder; discriminators keep batch norm where this is instance")
    encoder_dropout: float = setting(0.0, "in every layer of the encoder", least=0, most=1)
    decoder_dropout: float = setting(0.0, "in the first three layers of the decoder", least=0, most=1)
    head: Head = setting("softmax", "of what reads attributes: two logits a binary attribute, or sigmoid, one")
    reconstruction: ReconstructionSettings = setting(ReconstructionSettings(), "the first term of what is minimised")
    learning_rate: float = setting(2e-4, "of encoder and decoder, and of each adversary that names none of its own", least=0)
    decay_share: float = setting(0.0, "last share of training, in which that rate falls in a straight line to 0", least=0, most=1)
    betas: tuple[float, float] = setting((0.5, 0.999), "of Adam")
    clip_norm: float = setting(5.0, "largest L2 norm of all gradients of one trained group; 0 = no clipping", least=0)
    ema_half_life: int = setting(0, "of the moving average of encoder and decoder, in images; 0 = none", least=0)
    shared_batch: bool = setting(False, "all phases of a step read the same batch; otherwise each reads its own stream")
    discriminator_others: Mode = setting("eval", "mode of encoder and decoder while an adversary learns")
    autoencoder_others: Mode = setting("eval", "mode of the adversaries' networks while encoder and decoder learn")
    latent: LatentSettings = setting(LatentSettings(), "a discriminator of latents, as published")
    patch: PatchSettings = setting(PatchSettings(), "a discriminator of image patches")
    classifier: ClassifierSettings = setting(ClassifierSettings(), "a classifier that reads the attributes of swaps")
    solved: SolvedSettings = setting(SolvedSettings(), "a critic of latents that is solved for, not trained")
    image: ImageSettings = setting(ImageSettings(), "a discriminator of images, which also reads their attributes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solved.weight > 0 and not self.latent.steps and not self.solved.steps:
            raise ValueError("solved: it sees no batch; set latent.steps or solved.steps to 1 or more")

    def layout(self, image_size: int, channels: int) -> Layout:
        sizes = {name: getattr(self, name) for name in PRESETS[self.preset]}
        given = {name: size for name, size in sizes.items() if size is not None}
        return Layout(image_size, channels, num_skips=self.num_skips, **{**PRESETS[self.preset], **given})


@register
class Fader(Method):
    """Networks: encoder, decoder, and those of the adversaries."""

    name = "fader"
    Settings = FaderSettings
    for_use = ("encoder", "decoder")

    def build(self) -> dict[str, nn.Module]:
        s, layout, width = self.settings, self.settings.layout(self.image_size, self.channels), self.attributes.code_width
        encoder = Encoder(layout, s.norm, s.encoder_dropout)
        decoder = Decoder(layout, width, s.norm, s.deconv, s.decoder_dropout, s.skip, s.last_deconv)
        self.adversaries = self._adversaries(layout)
        pressing = {adversary.network: adversary.build() for adversary in self.adversaries}
        return {"encoder": encoder, "decoder": decoder, **pressing}

    def _adversaries(self, layout: Layout) -> list[Adversary]:
        s = self.settings
        norm: Norm = "global" if s.norm == "instance" else s.norm
        stream = "fader" if s.shared_batch else ""
        about = Autoencoder(self.attributes, s.head, layout, norm, self._optimizer(), s.discriminator_others, stream)

        def built(kind: type[Adversary], settings: AdversarySettings) -> list[Adversary]:
            """The adversary, if it has a weight; what its settings leave open of the rise is the latent adversary's."""
            rise = {name: getattr(s.latent, name) for name in ("ramp_images", "warmup_images", "rise")}
            open_ = {name: value for name, value in rise.items() if getattr(settings, name) is None}
            return [kind(dataclasses.replace(settings, **open_), about)] if settings.weight > 0 else []

        solved = built(SolvedAdversary, s.solved)
        latent = [LatentAdversary(s.latent, about, observers=solved)] if s.latent.steps else []
        images = [*built(PatchAdversary, s.patch), *built(ImageAdversary, s.image)]
        return [*latent, *images, *built(AttributeAdversary, s.classifier), *solved]

    def stages(self) -> tuple[Stage, ...]:
        s = self.settings
        stream = "fader" if s.shared_batch else ""
        autoencoder = Phase(("encoder", "decoder"), self.autoencoder_loss, others=s.autoencoder_others, stream=stream)
        phases = [phase for adversary in self.adversaries for phase in adversary.phases()]
        return (Stage("fader", (*phases, autoencoder), s.images),)

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        groups = {}
        for adversary in self.adversaries:
            groups |= adversary.optimizers()
        return {**groups, ("encoder", "decoder"): self._optimizer()}

    def _optimizer(self) -> Optimizer:
        s, decay = self.settings, round(self.settings.decay_share * self.settings.images)
        return dataclasses.replace(Optimizer.of(s), decay_from=s.images - decay, decay_images=decay)

    def differentiated_twice(self) -> tuple[str, ...]:
        return tuple(adversary.network for adversary in self.adversaries if adversary.differentiated_twice)

    def schedules(self) -> dict[str, Schedule]:
        return {adversary.name: adversary.schedule() for adversary in self.adversaries}

    def autoencoder_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """Equation 3: reconstruct, and give way to every adversary."""
        view = View(self.attributes, networks, batch)
        error = batch.mean(squared_errors(view.reconstruction, batch.images))
        report = {"mse": error.detach()}
        if self.settings.reconstruction.error == "absolute":
            error = batch.mean(absolute_errors(view.reconstruction, batch.images))
        loss = self.settings.reconstruction.weight * error
        for adversary in self.adversaries:
            pressure = adversary.pressure(networks, view, batch, context)
            loss = loss + pressure.value
            report |= pressure.report
        return Loss(loss, {f"autoencoder/{name}": value for name, value in report.items()})

    def encode(self, images: Tensor, labels: Tensor) -> Latent:
        """Images [N, C, S, S] to their latent. This encoder needs no labels; it takes them as all methods do."""
        return self.networks["encoder"](images)

    def decode(self, latent: Latent, code: Tensor) -> Tensor:
        return wide(self.networks["decoder"](latent, code))
