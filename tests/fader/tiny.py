"""Tiny methods, batches whose truth is planted, one update by hand: no engine, so only mathematics is on trial."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fader.attributes import Attribute, Attributes
from fader.method import METHODS, Batch, Context, Method, Phase
from fader.methods import Fader, FaderSettings

MIXED = Attributes([Attribute("Smiling"), Attribute("Beard", "k-way", ("none", "short", "long")), Attribute("Male")])
SMALL = {
    "init_channels": 4,
    "max_channels": 8,
    "num_layers": 3,
    "hidden_channels": 16,
    "dropout": 0.0,
    "images": 1000,
    "ramp_images": 0,
}


def tiny(name: str, attributes: Attributes = MIXED, image_size: int = 32, **changes) -> Method:
    """A method of METHODS with the smallest networks its settings allow, the same at every call.

    changes: settings; of a nested one, a dictionary of what changes in it.
    """
    kind = METHODS[name]
    settings = small(kind.Settings(), **changes)
    torch.manual_seed(11)
    return kind(settings, attributes, image_size)


def small(settings: Any, **changes: Any) -> Any:
    """Settings with the smallest sizes, in their parts, too, and some changes."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            values[name] = small(value, **changes.get(name, {}))
        else:
            follows = name == "ramp_images" and value is None  # the latent adversary's
            values[name] = changes.get(name, value if follows else SMALL.get(name, value))
    assert changes.keys() <= values.keys(), changes
    return type(settings)(**values)


def tiny_fader(attributes: Attributes = MIXED, image_size: int = 32, **changes) -> Fader:
    method = tiny("fader", attributes, image_size, **changes)
    assert isinstance(method, Fader) and isinstance(method.settings, FaderSettings)
    return method


def planted(attributes: Attributes = MIXED, count: int = 12, image_size: int = 32, seed: int = 0) -> Batch:
    """Noise whose brightness in column band j is the label of attribute j, from -0.5 to 0.5."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.stack([torch.arange(count) // (j + 1) % a.k for j, a in enumerate(attributes)], 1).float()
    images = 0.1 * torch.randn(count, 3, image_size, image_size, generator=generator)
    for j, band in enumerate(torch.arange(image_size).chunk(len(attributes))):
        images[:, :, :, band] += (labels[:, j] / (attributes[j].k - 1) - 0.5)[:, None, None, None]
    return Batch.alone(images.clamp(-1, 1), labels, seed=seed)


def stand(method: Method, phase: Phase) -> None:
    """Modes and frozen networks as the engine sets them."""
    for name, network in method.networks.items():
        network.train(name in phase.trains or phase.others == "train")
        network.requires_grad_(name in phase.trains)


def phases(method: Method) -> dict[str, Phase]:
    return {phase.name: phase for stage in method.stages() for phase in stage.phases}


def context(method: Method, images: int = 0) -> Context:
    """What a loss may know after so many images, on one process."""
    return Context(method.weights(images))


def loss_of(method: Method, name: str, batch: Batch, images: int = 0):
    """A phase's loss after so many images, with the networks standing as that phase asks."""
    phase = phases(method)[name]
    stand(method, phase)
    return phase.loss(method.networks, batch, context(method, images))


def weights(method: Method) -> dict[str, Tensor]:
    return {f"{n}/{k}": v.detach().clone() for n, m in method.networks.items() for k, v in m.state_dict().items()}


def changed(before: dict[str, Tensor], method: Method) -> set[str]:
    """Networks of which a weight or a buffer that is in `before` differs."""
    return {key.split("/")[0] for key, value in weights(method).items() if key in before and not torch.equal(value, before[key])}


def two_groups(many: int, share: float, apart: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[N, 3] latents of very different scales and a correlation, whose label moves the second by `apart` of its deviations;
    [N, 1] labels, a share of them 1."""
    chance = torch.Generator().manual_seed(seed)
    labels = (torch.rand(many, 1, generator=chance) < share).float()
    noise = torch.randn(many, 3, generator=chance)
    noise[:, 0] += noise[:, 2]
    noise[:, 1] += apart * labels[:, 0]
    return noise * torch.tensor([10.0, 1.0, 0.1]) + 5, labels
