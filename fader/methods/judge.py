"""The judge: an attribute classifier trained on real images, which says whether a swap shows what was asked for.

Source of the official presets: the evaluation classifier of facebookresearch/FaderNetworks. The residual presets are of
another build, because a decoder that learnt to please one build seldom pleases both.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fader.attributes import Head
from fader.counts import LabelCounts
from fader.losses.attributes import accuracies, attribute_losses
from fader.method import Batch, Context, Loss, Method, Networks, Optimizer, Phase, Stage, register
from fader.networks.classifier import Classifier
from fader.networks.layers import wide
from fader.networks.residual import ResidualClassifier
from fader.settings import Settings, setting

PRESETS: dict[str, dict[str, int]] = {
    "official": {"init_channels": 32, "max_channels": 512, "hidden_channels": 512},
    "small": {"init_channels": 16, "max_channels": 128, "hidden_channels": 128},  # about a fifth of the time at 64×64
    "residual": {"init_channels": 32, "max_channels": 256},
    "small_residual": {"init_channels": 16, "max_channels": 64},
}


@dataclass(frozen=True)
class JudgeSettings(Settings):
    images: int = setting(1_000_000, "length of training, in images", least=1)
    preset: Literal["official", "small", "residual", "small_residual"] = setting("official", "build and sizes; see below")
    init_channels: int | None = setting(None, "of the first convolution", least=1)
    max_channels: int | None = setting(None, "channels double layer by layer up to this", least=1)
    hidden_channels: int | None = setting(None, "of the hidden layer before the logits; a residual network has none", least=1)
    norm: Literal["global", "local"] = setting("global", "whose statistics normalise: the global batch's, or this rank's share's")
    asked: tuple[str, ...] = setting((), "attributes whose mean loss counts as the mean of all others, which only help to learn")
    head: Head = setting("softmax", "two logits a binary attribute, or one with sigmoid")
    dropout: float = setting(0.0, "after each convolution; of a residual network before the logits", least=0, most=1)
    # uniform takes the labels' frequencies out of the logits, which raises balanced accuracy because a rare value is then read as
    # readily as a common one; data judges as it was trained
    prior: Literal["uniform", "data"] = setting("uniform", "how common it takes values to be when it judges")
    learning_rate: float = setting(1e-3, "of Adam", least=0)
    betas: tuple[float, float] = setting((0.5, 0.999), "of Adam")
    weight_decay: float = setting(0.0, "share of each weight that a step takes off, times the learning rate", least=0)
    decay_from: int = setting(0, "images after which the learning rate begins to fall", least=0)
    decay_images: int = setting(0, "images within which it then falls to 0, in a straight line; 0 = it does not fall", least=0)
    clip_norm: float = setting(5.0, "largest L2 norm of all gradients; 0 = no clipping", least=0)
    ema_half_life: int = setting(0, "images after which an old weight counts half in the moving average; 0 = keep none", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_residual and self.hidden_channels is not None:
            raise ValueError(f"hidden_channels is {self.hidden_channels}, and the preset {self.preset} has no hidden layer")

    @property
    def is_residual(self) -> bool:
        return self.preset.endswith("residual")

    def sizes(self) -> dict[str, int]:
        given = {name: getattr(self, name) for name in PRESETS[self.preset]}
        return {**PRESETS[self.preset], **{name: size for name, size in given.items() if size is not None}}


def refuse_judges_networks(method: Method) -> None:
    """Raises ValueError when a method that is no judge has a residual classifier: what a loss learns to please proves nothing."""
    parts = [part for network in method.networks.values() for part in network.modules()]
    if not isinstance(method, Judge) and any(isinstance(part, ResidualClassifier) for part in parts):
        raise ValueError(f"{method.name} trains with the residual classifier, which is kept for judges; use another network")


@register
class Judge(Method):
    """Networks: classifier, and the observer label_counts."""

    name = "judge"
    Settings = JudgeSettings

    def build(self) -> dict[str, nn.Module]:
        settings, attributes = self.settings, self.attributes
        missing, rest = set(settings.asked) - set(attributes.names), len(attributes) - len(set(settings.asked))
        if missing:
            raise ValueError(f"asked: {', '.join(sorted(missing))} is not among the attributes of the data")
        asked = [1 / len(settings.asked) if name in settings.asked else 1 / rest for name in attributes.names]
        self.asked = settings.asked
        self.counts = asked if settings.asked else [1.0] * len(attributes)
        build = ResidualClassifier if settings.is_residual else Classifier
        layout = (self.image_size, attributes.logits_width(settings.head), self.channels)
        return {
            "classifier": build(*layout, dropout=settings.dropout, norm=settings.norm, **settings.sizes()),
            "label_counts": LabelCounts(attributes),
        }

    def stages(self) -> tuple[Stage, ...]:
        phase = Phase(("classifier",), self.classifier_loss, observers=("label_counts",))
        return (Stage("judge", (phase,), self.settings.images),)

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        return {("classifier",): Optimizer.of(self.settings)}

    def classifier_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        networks["label_counts"].add(self.attributes, batch.attributes, context.reduce_sum)
        logits = networks["classifier"](batch.images)
        given = (self.attributes, logits, batch.attributes, batch.known, self.settings.head)
        loss = sum(weight * each for weight, each in zip(self.counts, attribute_losses(*given)))
        right = accuracies(*given)
        report = {f"classifier/accuracy.{name}": part for name, part in zip(self.attributes.names, right)}
        return Loss(loss, {"classifier/loss": loss.detach(), **report})

    def judge(self, images: Tensor) -> Tensor:
        logits = wide(self.networks["classifier"](images))
        if self.settings.prior == "data":
            return logits
        return logits - self.networks["label_counts"].prior(self.attributes, self.settings.head)
