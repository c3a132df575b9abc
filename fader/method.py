"""The one interface between mathematics and machinery: a method is stages of phases.

A method owns networks and says, as data, which of them each phase trains, with which loss, on batches from where. The
engine freezes the others, wraps the whole loss for its back end, and steps. Nothing here knows of ranks, files or time.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fader.attributes import Attributes
from fader.draws import Draws
from fader.schedules import Schedule
from fader.similarity import Similarity

Networks = Mapping[str, nn.Module]
ReduceSum = Callable[[Tensor], Tensor]


def identity(tensor: Tensor) -> Tensor:
    """The sum over all ranks, when there is one."""
    return tensor


class SumsOverRanks(nn.Module):
    """Base of layers that need sums over the global batch; `Context.connect` gives them the function for it."""

    reduce_sum: ReduceSum = staticmethod(identity)


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    images: [N, C, H, W] float in [-1, 1]; None for a phase whose source is "labels".
    attributes: [N, A] float labels as stored: 0 … k-1 for binary and k-way, [0, 1] for continuous, -1 unknown.
    index: [N] int64 row of each record in its split. draws: the batch's random numbers, keyed by record.
    size: scalar float32, records of the global batch divided by the number of ranks. A sum over this rank's records divided by
        `size` becomes, averaged over ranks, the mean over the global batch, also when shares are uneven.
    known: [A] the same for each attribute, counting only the records whose label is known.
    records: of the global batch, as a Python number, for the host alone: learning rates and moving averages follow it, and no
        loss reads it.
    """

    images: Tensor | None
    attributes: Tensor
    index: Tensor
    draws: Draws
    size: Tensor
    known: Tensor
    records: int

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the global batch of [N] values, as this rank's part of an average over ranks."""
        return values.sum() / self.size

    @staticmethod
    def alone(images: Tensor | None, attributes: Tensor, seed: int = 0, stream: str = "alone", draw: int = 0) -> "Batch":
        """A batch that is the whole global batch, its records numbered from 0: for tests, tools and one-off use."""
        records, device = len(attributes), attributes.device
        index, size = torch.arange(records, device=device), torch.full((), float(records), device=device)
        known = (attributes >= 0).sum(0).to(torch.float32)
        return Batch(images, attributes, index, Draws.of(seed, stream, draw, index), size, known, records)


@dataclass(frozen=True)
class Loss:
    """value: the scalar to minimise. report: detached scalars to log, each a part of the mean over the global batch."""

    value: Tensor
    report: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Clock:
    """Images seen by all ranks: the clock of every schedule.
    images: since the run began. stage_images: since the stage began. updates: steps since the run began.
    stage: which of the method's stages this is."""

    images: int = 0
    stage_images: int = 0
    updates: int = 0
    stage: int = 0

    def after(self, images: int) -> "Clock":
        return Clock(self.images + images, self.stage_images + images, self.updates + 1, self.stage)

    def next_stage(self) -> "Clock":
        return Clock(self.images, 0, self.updates, self.stage + 1)


@dataclass(frozen=True)
class Context:
    """What a loss may know of the world.
    weights: the value at this update of each of the method's schedules, a scalar float32 tensor on the device.
    reduce_sum: differentiable sum over all ranks, the identity on one."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    reduce_sum: ReduceSum = identity

    def connect(self, networks: nn.Module) -> None:
        """Let the layers that need sums over ranks take them as the losses do."""
        for module in networks.modules():
            if isinstance(module, SumsOverRanks):
                module.reduce_sum = self.reduce_sum


LossFunction = Callable[[Networks, Batch, Context], Loss]
Source = Literal["images", "labels"]


@dataclass(frozen=True)
class Phase:
    """One update of one trained group.

    trains: names of the networks trained: a key of the method's `optimizers()`; empty for a phase whose loss runs without
        gradients, so that observers take note or running statistics are refreshed (others: "train"). loss: what to minimise.
    source: "images" reads images and labels; "labels" reads labels only (no image is decoded); None reads nothing and receives a
        batch of zero records of labels with `size` records of draws.
    others: the mode in which the networks that are not trained stand. repeat: updates of this phase in each step that has it.
    every: steps from one that has this phase to the next; the run's first step has it.
    stream: which sequence of batches it reads; by default its own. Phases that name the same stream share batches.
    observers: names of networks without weights that take note of the batch. The engine does not undo what they noted when an
        update is not finite, so they leave out by themselves what is not finite.
    name: what reports and streams call it; by default the trained networks, or the observers, joined by "+".
    """

    trains: tuple[str, ...]
    loss: LossFunction
    source: Source | None = "images"
    others: Literal["eval", "train"] = "eval"
    repeat: int = 1
    every: int = 1
    stream: str = ""
    observers: tuple[str, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", "+".join(self.trains or self.observers))
        if not self.stream:
            object.__setattr__(self, "stream", self.name)
        if min(self.repeat, self.every) < 1:
            raise ValueError(f"phase {self.name}: repeat {self.repeat} and every {self.every} must be at least 1")


@dataclass(frozen=True)
class Stage:
    """Phases repeated, in order, for a number of images."""

    name: str
    phases: tuple[Phase, ...]
    images: int


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Settings of one trained group.

    betas are Adam's, momentum is SGD's. weight_decay: each step of Adam takes this share of the learning rate off every weight
    (Loshchilov and Hutter 2019, arXiv:1711.05101); of SGD it is the L2 penalty. clip_norm: largest L2 norm of all its gradients
    together, 0 = none.
    ema_half_life: images after which an old weight counts half in the exponential moving average; 0 keeps none.
    decay_from, decay_images: from so many images of a stage on the learning rate falls, in a straight line, to 0 within
    decay_images; 0 = never.
    """

    kind: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 5.0
    ema_half_life: int = 0
    decay_from: int = 0
    decay_images: int = 0

    @classmethod
    def of(cls, settings: Any) -> "Optimizer":
        """What a method's settings say of it, by the same names; the rest as here."""
        return cls(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(cls) if hasattr(settings, f.name)})

    def rate(self, stage_images: int) -> float:
        if not self.decay_images or stage_images < self.decay_from:
            return self.learning_rate
        return self.learning_rate * max(0.0, 1 - (stage_images - self.decay_from) / self.decay_images)


class Method:
    """Base of every method. Subclasses set `name` and `Settings`, and implement `build`, `stages` and `optimizers`.

    for_use: the networks that encoding, decoding, sampling or judging need, where that is not all of them; what only training
    needs is left out of exports.
    settings: an instance of the subclass's `Settings` dataclass.
    attributes: what the decoder is conditioned on, in the order of the batch's columns.
    image_size: pixels a side, a power of two. channels: 3 for colour, 1 for grey.
    """

    name: ClassVar[str]
    Settings: ClassVar[type]
    for_use: ClassVar[tuple[str, ...]] = ()
    asked: tuple[str, ...] = ()  # of a judge: attributes that it answers for, where others only helped it to learn
    learns_geometry: ClassVar[bool] = False  # its truth is where things stand in a picture, so augmentation must not move them

    def __init__(self, settings: Any, attributes: Attributes, image_size: int, channels: int = 3) -> None:
        if not isinstance(settings, self.Settings):
            raise TypeError(f"{self.name} takes {self.Settings.__name__}, got {type(settings).__name__}")
        if not attributes and not self.learns_geometry:
            raise ValueError(f"{self.name} needs at least one attribute; name some")
        self.settings, self.attributes = settings, attributes
        self.image_size, self.channels = image_size, channels
        self.networks = self.build()

    def build(self) -> dict[str, nn.Module]:
        """Make the networks, by name."""
        return {}

    def stages(self) -> tuple[Stage, ...]:
        raise NotImplementedError

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        """One entry a trained group. No network may stand in two groups."""
        raise NotImplementedError

    def schedules(self) -> dict[str, Schedule]:
        """The weights that change over the run, by the names that losses read in `Context.weights`."""
        return {}

    def differentiated_twice(self) -> tuple[str, ...]:
        """Names of networks of which a loss differentiates a gradient again, as R1 does: torch.compile cannot take them."""
        return ()

    def weights(self, images: int, device: torch.device | None = None) -> dict[str, Tensor]:
        """Each schedule's value after so many images of the run, as `Context.weights` holds them."""
        return {name: torch.tensor(schedule.at(images), device=device) for name, schedule in self.schedules().items()}

    def settings_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.settings)


METHODS: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Class decorator: makes a method known by its `name`."""
    if METHODS.get(method.name, method) is not method:
        raise ValueError(f"two methods are called {method.name!r}")
    METHODS[method.name] = method
    return method


@runtime_checkable
class Edits(Protocol):
    """Encodes and decodes, so that attributes of a picture can be changed.
    encode(images [N,C,H,W], labels [N,A]) -> a code that only the same method's decode reads.
    decode(what encode gave, code [N, attributes.code_width]) -> images [N,C,H,W] in [-1, 1]."""

    def encode(self, images: Tensor, labels: Tensor) -> Any: ...

    def decode(self, latent: Any, code: Tensor) -> Tensor: ...


@runtime_checkable
class Samples(Protocol):
    """sample(noise [N, noise_width], code [N, attributes.code_width]) -> images [N,C,H,W] in [-1, 1]."""

    noise_width: int

    def sample(self, noise: Tensor, code: Tensor) -> Tensor: ...


@runtime_checkable
class Judges(Protocol):
    """judge(images [N,C,H,W]) -> logits [N, attributes.logits_width(head)] of either head, blocks in attribute order."""

    def judge(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class Aligns(Protocol):
    """align(windows [N,C,S,S]) -> N similarities by which the faces in them are off; window: where it lies in a picture."""

    window: Similarity
    window_size: int

    def align(self, windows: Tensor) -> Similarity: ...
