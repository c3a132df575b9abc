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
from fader.counts import LabelCounts, LeakControl
from fader.critic import FisherCritic
from fader.kernel_critic import KernelCritic
from fader.losses import accuracies, attribute_loss, confusion_loss, fool_loss, patch_losses, squared_errors
from fader.method import Batch, Context, Loss, Method, Networks, Optimizer, Phase, Stage, register
from fader.networks.autoencoder import PRESETS, Decoder, Encoder, Latent, Layout, Preset
from fader.networks.classifier import Classifier
from fader.networks.discriminators import LatentDiscriminator, PatchDiscriminator
from fader.networks.layers import Deconv, wide
from fader.networks.normalization import Norm
from fader.schedules import Rise, risen

_OBSERVERS = ("leak_control", "label_counts", "critic")  # what looks on while the latent discriminator learns

Mode = Literal["eval", "train"]
Fool = Literal["flipped", "marginal"]


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
            "constant". "feedback": lambda_max times a factor that holds the leak at leak_target (see `LeakControl`);
            the other two grow linearly.
        leak_target: share of the labels' entropy that the latent discriminator may read, mean over the attributes.
        fool: where the encoder leads the latent discriminator: "flipped", to the opposite labels, as published; or
            "marginal", to the frequencies of the labels, whatever the picture (see `confusion_loss`).
        feedback_images: images over which a leak one unit above its target multiplies λ by e.
        lambda_patch, lambda_classifier: weights of the patch discriminator's and the classifier's verdict on images
            decoded with random attributes; at 0 these networks do not exist.
        lambda_fisher: weight of what a reader that is solved for, not trained, makes of the latent; it sees further than a
            discriminator that has to learn. At 0 there is no such critic.
        critic: which: "moments", a linear reader and random features, by running moments (see `FisherCritic`); or
            "kernel", a reader of any shape, of the latents seen last (see `KernelCritic`), which reads more and costs more.
        fisher_steps: batches a step of which the critic alone takes note: they cost the encoder's forward pass, and what
            it knows is of more records, or more recent. The critic by moments also sees the discriminator's; that by
            the kernel sees no others and needs at least one.
        fisher_half_life, fisher_hidden: of the moments: images after which an old latent counts half; random features by
            which the critic also sees what no linear reader does.
        fisher_records, fisher_ridge, fisher_every: of the kernel: latents that are remembered (the more, the less of
            what it reads is chance; its time grows with their cube); how coarse it is; steps from one solution to the next.
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
    lambda_shape: Rise | Literal["feedback"] = "linear"
    leak_target: float = 0.05
    feedback_images: int = 2_000
    fool: Fool = "flipped"
    lambda_patch: float = 0.0
    lambda_classifier: float = 0.0
    lambda_fisher: float = 0.0
    critic: Literal["moments", "kernel"] = "moments"
    fisher_steps: int = 0
    fisher_half_life: int = 2_000
    fisher_hidden: int = 256
    fisher_records: int = 4_096
    fisher_ridge: float = 1e-3
    fisher_every: int = 16
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
        if self.lambda_shape not in (*get_args(Rise), "feedback"):
            raise ValueError(f"lambda_shape {self.lambda_shape!r} is none of {', '.join(get_args(Rise))}, feedback")
        if self.fool not in get_args(Fool):
            raise ValueError(f"fool {self.fool!r} is none of {', '.join(get_args(Fool))}")
        if self.critic not in ("moments", "kernel"):
            raise ValueError(f"critic {self.critic!r} is none of moments, kernel")
        if self.critic == "kernel" and self.lambda_fisher > 0 and min(self.fisher_steps, self.fisher_every) < 1:
            raise ValueError(
                f"the kernel's critic reads batches of its own: fisher_steps is {self.fisher_steps} and fisher_every "
                f"{self.fisher_every}; neither can be below 1"
            )
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
    """Networks: encoder, decoder, latent_discriminator; patch_discriminator and classifier where their λ is above 0;
    leak_control, which learns nothing, where λ is set by feedback; so label_counts where the encoder is led to them, and
    critic where lambda_fisher is above 0."""

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
        if s.lambda_shape == "feedback":
            self.networks["leak_control"] = LeakControl(attributes, s.leak_target, s.feedback_images)
        if s.fool == "marginal":
            self.networks["label_counts"] = LabelCounts(attributes)
        if s.lambda_fisher > 0:
            size = math.prod(layout.shallowest_shape)
            if s.critic == "kernel":
                self.networks["critic"] = KernelCritic(attributes, size, s.fisher_records, s.fisher_ridge)
            else:
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
        by_moments = s.critic == "moments"
        watch = tuple(name for name in _OBSERVERS if name in self.networks and (by_moments or name != "critic"))
        watching = {"latent_discriminator": watch}
        phases = [
            Phase((name,), loss, others=s.discriminator_others, repeat=steps, stream=stream, refreshes=watching.get(name, ()))
            for name, loss, steps in learners
        ]
        look = {"others": s.discriminator_others, "refreshes": ("critic",)}
        if "critic" in self.networks and s.fisher_steps:  # always batches of its own: those of other phases it has seen
            phases.append(Phase((), self.observe, repeat=s.fisher_steps, **look))
        if "critic" in self.networks and not by_moments:
            phases.append(Phase((), self.solve, source=None, name="solution", **look))
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

    def discriminator_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """The latent discriminator learns to read the attributes off the latent; the encoder is only looked at."""
        with torch.no_grad():
            latent = networks["encoder"](batch.images)
        logits = networks["latent_discriminator"](latent)
        if "label_counts" in networks:
            networks["label_counts"].add(self.attributes, batch.attributes, context.reduce_sum)
        if "critic" in networks and self.settings.critic == "moments":
            self._note(networks, latent, batch, context)
        if "leak_control" in networks:
            losses = self.attributes.losses(logits.detach(), batch.attributes, batch.known, self.settings.head)
            networks["leak_control"].observe(
                self.attributes, losses, batch.attributes, batch.known, context.reduce_sum
            )
        return self._recognition("latent_discriminator", logits, batch)

    def observe(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """Nothing learns; the critic takes note of the latents."""
        latent = networks["encoder"](batch.images)
        self._note(networks, latent, batch, context)
        return Loss(latent.shallowest.new_zeros(()))

    def _note(self, networks: Networks, latent: Latent, batch: Batch, context: Context) -> None:
        over_ranks = context.gather if self.settings.critic == "kernel" else context.reduce_sum
        networks["critic"].observe(self.attributes, latent.shallowest.flatten(1), batch.attributes, over_ranks)

    def solve(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """Nothing learns; now and then the kernel's critic solves for what it remembers."""
        if context.clock.updates % self.settings.fisher_every == 0:
            networks["critic"].solve()
        return Loss(batch.known.new_zeros(()))

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
        s, images = self.settings, context.clock.images
        latent = networks["encoder"](batch.images)
        reconstruction = networks["decoder"](latent, self.attributes.code(batch.attributes))
        mse = batch.mean(squared_errors(reconstruction, batch.images))
        logits = networks["latent_discriminator"](latent)
        fool = self._fool(networks, logits, batch)
        if "leak_control" in networks:
            weight = s.lambda_max * networks["leak_control"].factor() if images >= s.warmup_images else 0.0
        else:
            weight = self._risen(s.lambda_max, images)
        loss = s.lambda_reconstruction * mse + weight * fool
        report: dict[str, Tensor | float] = {"mse": mse.detach(), "fool": fool.detach(), "lambda": weight}

        if "critic" in networks:
            estimates, separations = networks["critic"].read(
                self.attributes, latent.shallowest.flatten(1), batch.attributes
            )
            separation = batch.mean(estimates)
            loss = loss + self._risen(s.lambda_fisher, images) * separation
            named = zip(self.attributes.names, separations)
            report |= {"separation": separation.detach(), **{f"separation.{name}": each for name, each in named}}

        if "patch_discriminator" in networks or "classifier" in networks:
            labels, code = self._random_code(batch)
            swap = networks["decoder"](latent, code)
            if "patch_discriminator" in networks:
                patch = batch.mean(patch_losses(networks["patch_discriminator"](swap), 1 - s.smooth_label))
                loss = loss + self._risen(s.lambda_patch, images) * patch
                report["patch"] = patch.detach()
            if "classifier" in networks:
                every = batch.size.expand_as(batch.known)
                verdict = attribute_loss(self.attributes, networks["classifier"](swap), labels, every, s.head)
                loss = loss + self._risen(s.lambda_classifier, images) * verdict
                report["classifier"] = verdict.detach()
        return Loss(loss, {f"autoencoder/{name}": value for name, value in report.items()})

    def _fool(self, networks: Networks, logits: Tensor, batch: Batch) -> Tensor:
        """What the encoder minimises of the latent discriminator's logits."""
        attributes, head = self.attributes, self.settings.head
        if self.settings.fool == "flipped":
            return fool_loss(attributes, logits, batch.attributes, batch.known, batch.draws, head)
        odds = [block.exp() for block in networks["label_counts"].log_frequencies()]
        return confusion_loss(attributes, logits, batch.attributes, batch.known, head, odds)

    def _risen(self, weight: float, images: int) -> float:
        s = self.settings
        rise: Rise = "linear" if s.lambda_shape == "feedback" else s.lambda_shape
        return risen(weight, images, rise=rise, over=s.ramp_images, after=s.warmup_images)

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
