"""Fader networks: an autoencoder whose latent does not know the attributes, because a discriminator looked for them.

Source: Lample et al. 2017, arXiv:1706.00409. Where paper and authors' code (facebookresearch/FaderNetworks) differ, the
defaults follow the code.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fader.attributes import Attributes, Head
from fader.critic import FisherCritic
from fader.losses.adversarial import patch_losses
from fader.losses.attributes import accuracies, attribute_loss, fool_loss
from fader.losses.reconstruction import squared_errors
from fader.method import Batch, Context, Loss, Method, Networks, Optimizer, Phase, Stage, register
from fader.networks.autoencoder import PRESETS, Decoder, Encoder, Latent, Layout, Preset
from fader.networks.classifier import Classifier
from fader.networks.discriminators import LatentDiscriminator, PatchDiscriminator
from fader.networks.layers import Deconv, wide
from fader.networks.normalization import Norm
from fader.schedules import Rise, Schedule

Mode = Literal["eval", "train"]


@dataclass(frozen=True)
class FaderSettings:
    """
    Args:
        images: length of training (published: 1,000 epochs of 50,000 images; converged after 100 to 200).
        preset: network sizes; init_channels, max_channels and num_layers override it where they are given.
        num_skips: encoder maps handed to the decoder beside the latent.
        norm: of encoder and decoder; the discriminators keep batch norm where this is "instance".
        head: "softmax", two logits a binary attribute, or "sigmoid", one.
        lambda_reconstruction: weight of the mean squared error.
        lambda_max: weight of the fool loss after the ramp.
        ramp_images: images over which the weights of the fool loss and of all that follow grow from 0; 0 = none.
        warmup_images: images before that, in which they are 0 and only reconstruction is learnt.
        lambda_shape: how they grow: "linear" as published, "cosine", "step" (0, and all at once after ramp_images) or
            "constant".
        lambda_patch, lambda_classifier: weights of the patch discriminator's and the classifier's verdict on images
            decoded with random attributes; at 0 these networks do not exist.
        lambda_fisher: weight of what a critic that is solved for, not trained, reads in the latent (see `FisherCritic`).
            At 0 there is no such critic.
        fisher_steps: batches a step that the critic alone takes note of, beside the discriminator's. Each costs the
            encoder's forward pass.
        fisher_half_life: images after which an old latent counts half.
        fisher_hidden: random features by which the critic also sees what no linear reader does.
        smooth_label: the patch discriminator's targets are this and one minus this. Codes are never smoothed.
        learning_rate: of encoder and decoder, and of each other network that names none of its own.
        decay_share: the last share of training, in which the learning rate of encoder and decoder falls, in a straight
            line, to 0 while the discriminator keeps its own and catches up; 0 = none.
        clip_norm: L2 norm of all gradients of one trained group; 0 = no clipping.
        ema_half_life: of encoder's and decoder's moving average, in images; 0 = none.
        discriminator_steps, patch_steps, classifier_steps: updates of each in a step.
        shared_batch: all phases of a step read the same batch; otherwise each reads its own stream.
        discriminator_others: mode of encoder and decoder while a discriminator or the classifier learns.
        autoencoder_others: mode of the discriminators and the classifier while the autoencoder learns.
    """

    images: int = 50_000_000
    preset: Preset = "official"
    init_channels: int | None = None
    max_channels: int | None = None
    num_layers: int | None = None
    num_skips: int = 0
    deconv: Deconv = "convtranspose"
    norm: Norm = "global"
    encoder_dropout: float = 0.0
    decoder_dropout: float = 0.0
    latent_dropout: float = 0.3
    hidden_channels: int = 512
    head: Head = "softmax"
    lambda_reconstruction: float = 1.0
    lambda_max: float = 1e-4
    ramp_images: int = 16_000_000
    warmup_images: int = 0
    lambda_shape: Rise = "linear"
    lambda_patch: float = 0.0
    lambda_classifier: float = 0.0
    lambda_fisher: float = 0.0
    fisher_steps: int = 0
    fisher_half_life: int = 2_000
    fisher_hidden: int = 256
    smooth_label: float = 0.2
    learning_rate: float = 2e-4
    latent_discriminator_learning_rate: float | None = None
    patch_discriminator_learning_rate: float | None = None
    classifier_learning_rate: float | None = None
    decay_share: float = 0.0
    betas: tuple[float, float] = (0.5, 0.999)
    clip_norm: float = 5.0
    ema_half_life: int = 0
    discriminator_steps: int = 1
    patch_steps: int = 1
    classifier_steps: int = 1
    shared_batch: bool = False
    discriminator_others: Mode = "eval"
    autoencoder_others: Mode = "eval"

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is none of {', '.join(PRESETS)}")
        weights = ("lambda_reconstruction", "lambda_max", "lambda_patch", "lambda_classifier", "lambda_fisher")
        for name in (*weights, "ramp_images", "warmup_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.lambda_shape not in get_args(Rise):
            raise ValueError(f"lambda_shape {self.lambda_shape!r} is none of {', '.join(get_args(Rise))}")
        if not 0 <= self.decay_share <= 1:
            raise ValueError(f"decay_share is {self.decay_share}; it must be from 0 to 1")
        if not 0 <= self.smooth_label < 0.5:
            raise ValueError(f"smooth_label is {self.smooth_label}; it must be at least 0 and below 0.5")

    def layout(self, image_size: int, channels: int) -> Layout:
        """The network sizes: the preset's, where nothing else is given."""
        sizes = {name: getattr(self, name) for name in PRESETS[self.preset]}
        given = {name: size for name, size in sizes.items() if size is not None}
        return Layout(image_size, channels, num_skips=self.num_skips, **{**PRESETS[self.preset], **given})


@register
class Fader(Method):
    """Networks: encoder, decoder, latent_discriminator; patch_discriminator, classifier and critic where their λ is above 0."""

    name = "fader"
    Settings = FaderSettings
    for_use = ("encoder", "decoder")
    settings: FaderSettings

    def __init__(self, settings: FaderSettings, attributes: Attributes, image_size: int, channels: int = 3) -> None:
        super().__init__(settings, attributes, image_size, channels)
        s, layout = settings, settings.layout(image_size, channels)
        if not attributes:
            raise ValueError("a Fader network needs at least one attribute to slide; name some")
        num_logits = attributes.logits_width(s.head)
        batch_norm: Norm = "global" if s.norm == "instance" else s.norm
        self.networks: dict[str, nn.Module] = {
            "encoder": Encoder(layout, s.norm, s.encoder_dropout),
            "decoder": Decoder(layout, attributes.code_width, s.norm, s.deconv, s.decoder_dropout),
            "latent_discriminator": LatentDiscriminator(
                layout, num_logits, s.hidden_channels, s.latent_dropout, batch_norm
            ),
        }
        if s.lambda_fisher > 0:
            size = math.prod(layout.shallowest_shape)
            self.networks["critic"] = FisherCritic(attributes, size, s.fisher_half_life, s.fisher_hidden)
        sizes = {"init_channels": layout.init_channels, "max_channels": layout.max_channels, "norm": batch_norm}
        if s.lambda_patch > 0:
            self.networks["patch_discriminator"] = PatchDiscriminator(image_size, channels, **sizes)
        if s.lambda_classifier > 0:
            self.networks["classifier"] = Classifier(
                image_size, num_logits, channels, hidden_channels=s.hidden_channels, **sizes
            )

    # --- training ---------------------------------------------------------------------------------------------------

    def stages(self) -> tuple[Stage, ...]:
        s = self.settings
        learners = [("latent_discriminator", self.discriminator_loss, s.discriminator_steps)]
        if "patch_discriminator" in self.networks:
            learners.append(("patch_discriminator", self.patch_loss, s.patch_steps))
        if "classifier" in self.networks:
            learners.append(("classifier", self.classifier_loss, s.classifier_steps))
        stream = "fader" if s.shared_batch else ""
        watching = {"latent_discriminator": tuple(name for name in ("critic",) if name in self.networks)}
        phases = [
            Phase((name,), loss, others=s.discriminator_others, repeat=steps, stream=stream, refreshes=watching.get(name, ()))
            for name, loss, steps in learners
        ]
        if "critic" in self.networks and s.fisher_steps:  # always batches of its own: those of other phases it has seen
            phases.append(Phase((), self.observe, others=s.discriminator_others, repeat=s.fisher_steps, refreshes=("critic",)))
        phases.append(Phase(("encoder", "decoder"), self.autoencoder_loss, others=s.autoencoder_others, stream=stream))
        return (Stage("fader", tuple(phases), s.images),)

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        s = self.settings

        def adam(own: float | None) -> Optimizer:
            rate = s.learning_rate if own is None else own
            return Optimizer(learning_rate=rate, betas=s.betas, clip_norm=s.clip_norm)

        rates = {
            "latent_discriminator": s.latent_discriminator_learning_rate,
            "patch_discriminator": s.patch_discriminator_learning_rate,
            "classifier": s.classifier_learning_rate,
        }
        groups = {(name,): adam(rate) for name, rate in rates.items() if name in self.networks}
        decay_images = round(s.decay_share * s.images)
        decay = {"decay_from": s.images - decay_images, "decay_images": decay_images}
        autoencoder = dataclasses.replace(adam(None), ema_half_life=s.ema_half_life, **decay)
        return {**groups, ("encoder", "decoder"): autoencoder}

    def schedules(self) -> dict[str, Schedule]:
        s = self.settings
        weights = {
            "latent": s.lambda_max,
            "solved": s.lambda_fisher,
            "patch": s.lambda_patch,
            "classifier": s.lambda_classifier,
        }
        return {
            name: Schedule(weight, over=s.ramp_images, after=s.warmup_images, rise=s.lambda_shape)
            for name, weight in weights.items()
        }

    def discriminator_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """The latent discriminator learns to read the attributes off the latent; the encoder is only looked at."""
        with torch.no_grad():
            latent = networks["encoder"](batch.images)
        logits = networks["latent_discriminator"](latent)
        if "critic" in networks:
            self._note(networks, latent, batch, context)
        return self._recognition("latent_discriminator", logits, batch)

    def observe(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """Nothing learns; the critic takes note of the latents."""
        latent = networks["encoder"](batch.images)
        self._note(networks, latent, batch, context)
        return Loss(latent.shallowest.new_zeros(()))

    def _note(self, networks: Networks, latent: Latent, batch: Batch, context: Context) -> None:
        networks["critic"].observe(self.attributes, latent.shallowest.flatten(1), batch.attributes, context.reduce_sum)

    def classifier_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """The classifier learns to read the attributes off real images."""
        return self._recognition("classifier", networks["classifier"](batch.images), batch)

    def patch_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """The patch discriminator learns to tell real images from those decoded with random attributes."""
        with torch.no_grad():
            decoded = networks["decoder"](networks["encoder"](batch.images), self._random_code(batch)[1])
        real = networks["patch_discriminator"](batch.images)
        fake = networks["patch_discriminator"](decoded)
        smooth = self.settings.smooth_label
        loss = batch.mean(patch_losses(real, 1 - smooth)) + batch.mean(patch_losses(fake, smooth))
        report = {"loss": loss, "real": batch.mean(real), "decoded": batch.mean(fake)}
        return Loss(loss, {f"patch_discriminator/{name}": value.detach() for name, value in report.items()})

    def autoencoder_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """Reconstruct; and lead the latent discriminator to the wrong attributes, with the weight λ of this moment."""
        s = self.settings
        latent = networks["encoder"](batch.images)
        reconstruction = networks["decoder"](latent, self.attributes.code(batch.attributes))
        mse = batch.mean(squared_errors(reconstruction, batch.images))
        logits = networks["latent_discriminator"](latent)
        fool = fool_loss(self.attributes, logits, batch.attributes, batch.known, batch.draws, s.head)
        weight = context.weights["latent"]
        loss = s.lambda_reconstruction * mse + weight * fool
        report: dict[str, Tensor] = {"mse": mse.detach(), "fool": fool.detach(), "lambda": weight.clone()}

        if "critic" in networks:
            estimates, separations = networks["critic"].read(
                self.attributes, latent.shallowest.flatten(1), batch.attributes
            )
            separation = batch.mean(estimates)
            loss = loss + context.weights["solved"] * separation
            named = zip(self.attributes.names, separations)
            report |= {"separation": separation.detach(), **{f"separation.{name}": each for name, each in named}}

        if "patch_discriminator" in networks or "classifier" in networks:
            labels, code = self._random_code(batch)
            swap = networks["decoder"](latent, code)
            if "patch_discriminator" in networks:
                patch = batch.mean(patch_losses(networks["patch_discriminator"](swap), 1 - s.smooth_label))
                loss = loss + context.weights["patch"] * patch
                report["patch"] = patch.detach()
            if "classifier" in networks:
                every = batch.size.expand_as(batch.known)
                verdict = attribute_loss(self.attributes, networks["classifier"](swap), labels, every, s.head)
                loss = loss + context.weights["classifier"] * verdict
                report["classifier"] = verdict.detach()
        return Loss(loss, {f"autoencoder/{name}": value for name, value in report.items()})

    def _random_code(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Labels [N, A] drawn uniformly over every attribute's values, and their code."""
        labels = self.attributes.resampled(batch.draws)
        return labels, self.attributes.code(labels)

    def _recognition(self, network: str, logits: Tensor, batch: Batch) -> Loss:
        head = self.settings.head
        loss = attribute_loss(self.attributes, logits, batch.attributes, batch.known, head)
        right = accuracies(self.attributes, logits, batch.attributes, batch.known, head)
        report = {f"{network}/accuracy.{name}": part for name, part in zip(self.attributes.names, right)}
        return Loss(loss, {f"{network}/loss": loss.detach(), **report})

    # --- use --------------------------------------------------------------------------------------------------------

    def encode(self, images: Tensor, labels: Tensor) -> Latent:
        """Images [N, C, S, S] to their latent. This encoder needs no labels; it takes them as all methods do."""
        return self.networks["encoder"](images)

    def decode(self, latent: Latent, code: Tensor) -> Tensor:
        """A latent and a code [N, attributes.code_width] to images [N, C, S, S] in [-1, 1]."""
        return wide(self.networks["decoder"](latent, code))
