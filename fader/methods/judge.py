"""The judge: an attribute classifier trained on real images, which says whether a swap shows what was asked for.

Source: the evaluation classifier of facebookresearch/FaderNetworks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fader.attributes import Attributes, Head
from fader.counts import LabelCounts
from fader.losses.attributes import accuracies, attribute_loss
from fader.method import Batch, Context, Loss, Method, Networks, Optimizer, Phase, Stage, register
from fader.networks.classifier import Classifier
from fader.networks.layers import wide
from fader.networks.normalization import Norm

PRESETS: dict[str, dict[str, int]] = {
    "official": {"init_channels": 32, "max_channels": 512, "hidden_channels": 512},
    "small": {"init_channels": 16, "max_channels": 128, "hidden_channels": 128},  # about a fifth of the time at 64×64
}


@dataclass(frozen=True)
class JudgeSettings:
    """
    Args:
        images: length of training, in images.
        preset: network sizes; init_channels, max_channels and hidden_channels override it where they are given.
        norm: "global" or "local" batch norm (an instance of one pixel cannot be normalised).
        head: "softmax", two logits a binary attribute, or "sigmoid", one.
        dropout: after each convolution.
        prior: "uniform" takes the training labels' frequencies out of the logits when it judges, which raises balanced
            accuracy because a rare value is then read as readily as a common one; "data" judges as it was trained.
        clip_norm: L2 norm of all gradients; 0 = no clipping.
    """

    images: int = 1_000_000
    preset: Literal["official", "small"] = "official"
    init_channels: int | None = None
    max_channels: int | None = None
    hidden_channels: int | None = None
    norm: Literal["global", "local"] = "global"
    head: Head = "softmax"
    dropout: float = 0.0
    prior: Literal["uniform", "data"] = "uniform"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 0.0
    clip_norm: float = 5.0
    ema_half_life: int = 0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is none of {', '.join(PRESETS)}")
        if self.norm not in ("global", "local"):
            raise ValueError(f"norm {self.norm!r} is none of global, local: a judge halves images down to one pixel")

    def sizes(self) -> dict[str, int]:
        """The network sizes: the preset's, where nothing else is given."""
        given = {name: getattr(self, name) for name in PRESETS[self.preset]}
        return {**PRESETS[self.preset], **{name: size for name, size in given.items() if size is not None}}


@register
class Judge(Method):
    """Networks: classifier, and the observer label_counts.

    Source of the uniform prior: Menon et al. 2021, arXiv:2007.07314, post-hoc logit adjustment with τ = 1.
    """

    name = "judge"
    Settings = JudgeSettings
    settings: JudgeSettings

    def __init__(self, settings: JudgeSettings, attributes: Attributes, image_size: int, channels: int = 3) -> None:
        super().__init__(settings, attributes, image_size, channels)
        if not attributes:
            raise ValueError("a judge needs at least one attribute to read; name some")
        norm: Norm = settings.norm
        self.networks = {
            "classifier": Classifier(
                image_size,
                attributes.logits_width(settings.head),
                channels,
                dropout=settings.dropout,
                norm=norm,
                **settings.sizes(),
            ),
            "label_counts": LabelCounts(attributes),
        }

    def stages(self) -> tuple[Stage, ...]:
        phase = Phase(("classifier",), self.classifier_loss, observers=("label_counts",))
        return (Stage("judge", (phase,), self.settings.images),)

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        return {("classifier",): Optimizer.of(self.settings)}

    def classifier_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """The classifier learns to read the attributes off real images; unknown labels are left out."""
        networks["label_counts"].add(self.attributes, batch.attributes, context.reduce_sum)
        logits = networks["classifier"](batch.images)
        loss = attribute_loss(self.attributes, logits, batch.attributes, batch.known, self.settings.head)
        right = accuracies(self.attributes, logits, batch.attributes, batch.known, self.settings.head)
        report = {f"classifier/accuracy.{name}": part for name, part in zip(self.attributes.names, right)}
        return Loss(loss, {"classifier/loss": loss.detach(), **report})

    def judge(self, images: Tensor) -> Tensor:
        """Images [N, C, S, S] in [-1, 1] to logits [N, attributes.logits_width(head)], before softmax or sigmoid."""
        logits = wide(self.networks["classifier"](images))
        if self.settings.prior == "data":
            return logits
        blocks = []
        for attribute, block, log_p in zip(
            self.attributes,
            self.attributes.blocks(logits, self.settings.head),
            self.networks["label_counts"].log_frequencies(),
        ):
            if attribute.kind == "continuous":
                blocks.append(block)
            else:
                blocks.append(block - (log_p if block.shape[1] > 1 else log_p[1] - log_p[0]))
        return torch.cat(blocks, 1)
