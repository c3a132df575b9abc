"""Four sham methods of some 20 lines each: what later methods need of the interface, and nothing else.

Each is registered under METHODS by `registered()` for the time of a test only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fader.method import METHODS, Loss, Method, Optimizer, Phase, Stage, SumsOverRanks, register

SGD = Optimizer(kind="sgd", learning_rate=0.05, clip_norm=0.0)


@dataclass(frozen=True)
class ShamSettings:
    images: int = 96


class Sampler(Method):
    """Two stages: a generator that meets a critic twice a step, reading labels only; then an encoder that inverts it."""

    name, Settings = "sham_sampler", ShamSettings

    def __init__(self, *args) -> None:
        super().__init__(*args)
        width = self.attributes.code_width
        self.networks = {
            "generator": nn.Sequential(nn.Linear(4 + width, 8), nn.Tanh(), nn.Linear(8, 6)),
            "critic": nn.Sequential(nn.Linear(6 + width, 8), nn.Tanh(), nn.Linear(8, 1)),
            "encoder": nn.Linear(6, 4),
        }

    def sample(self, networks, batch):
        noise = batch.draws.normal("noise", (4,)).to(batch.attributes.dtype)
        code = self.attributes.code(batch.attributes).to(noise.dtype)
        return noise, code, networks["generator"](torch.cat([noise, code], 1))

    def critic_loss(self, networks, batch, context):
        noise, code, fake = self.sample(networks, batch)
        real = torch.cat([code[:, :1].expand(-1, 6), code], 1)
        scores = networks["critic"](torch.cat([real, torch.cat([fake, code], 1)]))[:, 0].chunk(2)
        return Loss(batch.mean(F.relu(1 - scores[0]) + F.relu(1 + scores[1])))

    def generator_loss(self, networks, batch, context):
        _, code, fake = self.sample(networks, batch)
        return Loss(-batch.mean(networks["critic"](torch.cat([fake, code], 1))[:, 0]))

    def encoder_loss(self, networks, batch, context):
        noise, _, fake = self.sample(networks, batch)
        return Loss(batch.mean((networks["encoder"](fake) - noise).square().mean(1)))

    def optimizers(self):
        return {(name,): SGD for name in self.networks}

    def stages(self):
        critic = Phase(("critic",), self.critic_loss, source="labels", repeat=2)
        generator = Phase(("generator",), self.generator_loss, source="labels")
        encoder = Phase(("encoder",), self.encoder_loss, source="labels")
        return Stage("gan", (critic, generator), self.settings.images), Stage("invert", (encoder,), self.settings.images)


class Penalised(Method):
    """A critic of real images under a second-order gradient penalty."""

    name, Settings = "sham_penalised", ShamSettings

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.networks = {
            "critic": nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.Tanh(), nn.Flatten(), nn.LazyLinear(1)),
        }
        self.networks["critic"](torch.zeros(1, 3, self.image_size, self.image_size))

    def critic_loss(self, networks, batch, context):
        images = batch.images.detach().requires_grad_(True)
        scores = networks["critic"](images)[:, 0]
        (slope,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
        penalty = batch.mean(slope.square().sum((1, 2, 3)))
        return Loss(batch.mean(F.softplus(-scores)) + 10 * penalty, {"critic/penalty": penalty.detach()})

    def optimizers(self):
        return {("critic",): SGD}

    def stages(self):
        return (Stage("critic", (Phase(("critic",), self.critic_loss),), self.settings.images),)


class Dictionary(SumsOverRanks):
    """Keys that follow the sum of all records of the global batch that lie nearest to them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.linspace(-1, 1, 12).view(4, 3))

    def forward(self, features):
        nearest = torch.cdist(features, self.keys).argmin(1)
        nearest = (nearest[:, None] == torch.arange(4, device=features.device)).to(features.dtype)
        if self.training:
            total = self.reduce_sum(torch.cat([nearest.T @ features, nearest.sum(0)[:, None]], 1).detach())
            mean = total[:, :3] / total[:, 3:].clamp(min=1)
            self.keys.lerp_(torch.where(total[:, 3:] > 0, mean, self.keys), 0.2)
        return features + (nearest @ self.keys - features).detach()


class Quantised(Method):
    """An autoencoder through a dictionary whose state is a sum over all records of the global batch."""

    name, Settings = "sham_quantised", ShamSettings

    def __init__(self, *args) -> None:
        super().__init__(*args)
        pixels = 3 * self.image_size**2
        self.networks = {"autoencoder": nn.Sequential(nn.Flatten(), nn.Linear(pixels, 3), Dictionary(), nn.Linear(3, pixels))}

    def autoencoder_loss(self, networks, batch, context):
        mse = batch.mean((networks["autoencoder"](batch.images) - batch.images.flatten(1)).square().mean(1))
        return Loss(mse, {"autoencoder/mse": mse.detach()})

    def optimizers(self):
        return {("autoencoder",): SGD}

    def stages(self):
        return (Stage("quantised", (Phase(("autoencoder",), self.autoencoder_loss),), self.settings.images),)


class Generator(nn.Module):
    """Noise and code to a picture of one colour, which the noise changes little."""

    def __init__(self, width: int, channels: int, size: int) -> None:
        super().__init__()
        self.size, self.colours = size, nn.Linear(width, channels)

    def forward(self, noise, code):
        colours = self.colours(torch.cat([0.01 * noise, code.to(noise.dtype)], 1))
        return colours[:, :, None, None].expand(-1, -1, self.size, self.size)


class Drawing(Method):
    """Can sample and nothing else: a generator that learns which mean colour goes with which labels."""

    name, Settings, for_use = "sham_drawing", ShamSettings, ("generator",)
    noise_width = 4

    def __init__(self, *args) -> None:
        super().__init__(*args)
        width = self.noise_width + self.attributes.code_width
        self.networks = {
            "generator": Generator(width, self.channels, self.image_size),
            "discriminator": nn.Linear(1, 1),
        }

    def sample(self, noise, code):
        return self.networks["generator"](noise, code)

    def generator_loss(self, networks, batch, context):
        noise, code = batch.draws.normal("noise", (self.noise_width,)), self.attributes.code(batch.attributes)
        error = batch.mean((networks["generator"](noise, code) - batch.images).square().mean((1, 2, 3)))
        return Loss(error, {"generator/error": error.detach()})

    def optimizers(self):
        return {("generator",): Optimizer(learning_rate=0.05)}

    def stages(self):
        return (Stage("drawing", (Phase(("generator",), self.generator_loss),), self.settings.images),)


SHAMS = (Sampler, Penalised, Quantised)


@contextlib.contextmanager
def registered(*shams: type[Method]) -> Iterator[None]:
    """These shams, or the usual three, stand in METHODS while this lasts."""
    for sham in shams or SHAMS:
        register(sham)
    try:
        yield
    finally:
        for sham in shams or SHAMS:
            METHODS.pop(sham.name)
