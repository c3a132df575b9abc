"""A critic of latents that is solved for in closed form, not trained: what a linear reader could tell, by running moments."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fader.adversaries.adversary import Adversary, AdversarySettings, View
from fader.attributes import Attributes
from fader.method import Batch, Context, Loss, Networks, Optimizer, Phase, ReduceSum
from fader.networks.layers import wide
from fader.settings import setting

_WIDEST = 4096  # the covariance of so many numbers takes 128 MiB, and a second or more of a CPU core to solve


class Solution(NamedTuple):
    """What the moments come to. All float64, F = size + num_hidden.
    mean: [F] of all features. directions: [W, F], for each column of the code Σ⁻¹ (μ_v - μ̄), divided by k and by the share of
    all records that have the value. separations: [A]."""

    mean: Tensor
    directions: Tensor
    separations: Tensor


class FisherCritic(nn.Module):
    """Measures how far apart the means of an attribute's values lie in a latent, by Fisher's linear discriminant.

    A discriminator that learns by gradient steps is late, because the encoder moves away from it: on CelebA at 64×64 a fresh
    linear probe read Male with balanced accuracy 0.85 from latents of which the run's own discriminator, with four updates a
    step, read 0.72. Means and covariance settle within a few hundred records, and the best linear reader is the solution of
    linear equations in them.

    The separation of an attribute with k values is J = 1/k Σ_v (μ_v - μ̄)ᵀ Σ⁻¹ (μ_v - μ̄). μ_v is the mean latent of the records
    with value v. μ̄ is the mean of all μ_v, so that rare values count as much as common ones. Σ is the covariance of all records.
    J is 0 when no linear reader can tell the values. For a binary attribute with equally likely values and Gaussian latents, a
    reader is right in 84 of 100 cases at J = 0.5, and in 63 at J = 0.1. A continuous attribute counts as its two ends, each
    record in proportion.

    Fixed random features of a latent z, max(0, (z - mean) R), stand beside z, because a reader with one hidden layer starts from
    such features and sees more than a linear one.

    The critic has no weights. Its state is sums that fade; they are buffers, equal on every rank and part of every checkpoint.
    size: numbers of a latent. num_hidden: random features beside them. half_life: images after which an old one counts half.
    shrinkage: this times the mean variance is added to each number's own.
    Raises ValueError: latent and features are too many for their covariance; half_life or shrinkage is not positive.
    Source: Fisher 1936, doi:10.1111/j.1469-1809.1936.tb02137.x; several values: Rao 1948, section 7; random features: Rahimi,
    Recht 2008, "Weighted sums of random kitchen sinks".
    """

    def __init__(self, attributes: Attributes, size: int, half_life: int, num_hidden: int = 0, shrinkage: float = 0.1) -> None:
        super().__init__()
        if size + num_hidden > _WIDEST:
            raise ValueError(f"{size:,} numbers and {num_hidden:,} features: too many for their covariance of {_WIDEST:,}")
        if half_life < 1 or shrinkage <= 0:
            raise ValueError(f"half_life {half_life} and shrinkage {shrinkage:g} must be positive")
        self.slices = attributes.code_slices()
        self.half_life, self.shrinkage = half_life, shrinkage
        chance = torch.Generator().manual_seed(0)  # the same features on every rank
        self.register_buffer("projection", torch.randn(size, num_hidden, generator=chance) / size**0.5)
        width, size = attributes.code_width, size + num_hidden
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("products", torch.zeros(size, size, dtype=torch.float64))
        self.register_buffer("value_counts", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("value_totals", torch.zeros(width, size, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, attributes: Attributes, latent: Tensor, labels: Tensor, reduce_sum: ReduceSum) -> None:
        """Add a batch of all ranks to the sums, unless any number of it is not finite.
        latent: [N, size]. labels: [N, A], -1 = unknown."""
        latent = self._features(latent).double()
        members = attributes.members(labels).double()
        sums = (
            latent.new_full((1,), len(latent)), latent.sum(0), latent.T @ latent, members.sum(0), members.T @ latent,
        )  # fmt: skip
        flat = reduce_sum(torch.cat([part.reshape(-1) for part in sums]))
        finite = flat.isfinite().all()  # the same on every rank, and the host does not wait for it
        fade = torch.where(finite, 0.5 ** (flat[0] / self.half_life), 1.0)
        flat = torch.where(finite, flat, 0.0)
        kept = (self.count, self.total, self.products, self.value_counts, self.value_totals)
        for old, new in zip(kept, flat.split([part.numel() for part in kept])):
            old.mul_(fade).add_(new.view_as(old))

    def _features(self, latent: Tensor) -> Tensor:
        """[N, size] to [N, size + num_hidden], at least float32."""
        latent = wide(latent)
        if not self.projection.shape[1]:
            return latent
        middle = self.total[: latent.shape[1]] / self.count.clamp(min=1)
        with torch.autocast(latent.device.type, enabled=False):
            curved = torch.relu((latent - middle.to(latent.dtype)) @ self.projection.to(latent.dtype))
        return torch.cat([latent, curved], 1)

    @torch.no_grad()
    def solve(self) -> Solution:
        """Solve for the sums so far. An attribute with a value that was never seen has separation 0."""
        count = self.count.clamp(min=1)
        mean = self.total / count
        covariance = self.products / count - torch.outer(mean, mean)
        ridge = self.shrinkage * covariance.diagonal().mean() + 1e-6
        covariance.diagonal().add_(ridge)
        means = self.value_totals / self.value_counts.clamp(min=1e-9)[:, None]
        apart, weights = torch.zeros_like(means), 1 / (self.value_counts / count).clamp(min=1e-6)
        for part in self.slices:
            apart[part] = torch.where((self.value_counts[part] > 0).all(), means[part] - means[part].mean(0), 0.0)
            weights[part] /= part.stop - part.start
        factor, _ = torch.linalg.cholesky_ex(covariance)  # raises nothing, so that the host need not wait
        directions = torch.cholesky_solve(apart.T, factor).T
        each = (directions * apart).sum(1)
        separations = torch.stack([each[part].mean() for part in self.slices])
        return Solution(mean, directions * weights[:, None], separations)

    def estimates(self, solution: Solution, attributes: Attributes, latent: Tensor, labels: Tensor) -> Tensor:
        """Each record's part of the sum of all separations, as far as its own latent decides it.
        The mean over a batch is an unbiased estimate of the sum, and its gradient moves the means of the values together.
        latent: [N, size], with gradients. labels: [N, A].
        Returns: [N], float64 where the latent is and float32 else; of either sign."""
        latent = self._features(latent)
        mean, directions, _ = (part.to(latent.dtype) for part in solution)
        with torch.autocast(latent.device.type, enabled=False):
            return (((latent - mean) @ directions.T) * attributes.members(labels)).sum(1)


@dataclass(frozen=True)
class SolvedSettings(AdversarySettings):
    steps: int = setting(0, "batches a step that it alone notes, beside the latent discriminator's; each is encoded", least=0)
    half_life: int = setting(2_000, "images after which an old latent counts half", least=1)
    num_hidden: int = setting(256, "random features by which it sees what no linear reader does", least=0)


class SolvedAdversary(Adversary):
    """Measures how far apart the values of attributes lie in the latent. Its network is an observer: no gradient trains it."""

    name, network = "solved", "critic"
    settings: SolvedSettings

    def build(self) -> FisherCritic:
        size = math.prod(self.autoencoder.layout.shallowest_shape)
        return FisherCritic(self.attributes, size, self.settings.half_life, self.settings.num_hidden)

    def phases(self) -> tuple[Phase, ...]:
        if not self.settings.steps:
            return ()
        about = {"others": self.autoencoder.others, "repeat": self.settings.steps}
        return (Phase((), self.observe, observers=("critic",), **about),)  # never the shared stream, which it sees already

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        return {}

    def observe(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        self.note(networks, self.view(networks, batch), batch, context)
        return Loss(batch.known.new_zeros(()))

    def note(self, networks: Networks, view: View, batch: Batch, context: Context) -> None:
        latent = view.latent.shallowest.flatten(1)
        networks["critic"].observe(self.attributes, latent, batch.attributes, context.reduce_sum)

    def pressure(self, networks: Networks, view: View, batch: Batch, context: Context) -> Loss:
        """The encoder moves the means of each attribute's values together."""
        critic, latent = networks["critic"], view.latent.shallowest.flatten(1)
        solution = critic.solve()
        separation = batch.mean(critic.estimates(solution, self.attributes, latent, batch.attributes))
        named = {f"separation.{name}": each for name, each in zip(self.attributes.names, solution.separations)}
        return Loss(context.weights["solved"] * separation, {"separation": separation.detach(), **named})
