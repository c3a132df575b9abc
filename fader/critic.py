"""A critic of latents that is solved, not learnt: what a linear reader could make of them, from running moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fader.attributes import Attributes
from fader.method import ReduceSum
from fader.networks.layers import wide

_WIDEST = 4096  # their covariance takes 128 MiB, and a second or more of a CPU core to solve


class Solution(NamedTuple):
    """All float64, F = size + num_hidden.

    mean: [F] of all features. directions: [W, F], for each column of the code Σ⁻¹ (μ_v - μ̄), divided by k and by the share
    of all records that have the value. separations: [A].
    """

    mean: Tensor
    directions: Tensor
    separations: Tensor


class FisherCritic(nn.Module):
    """How far apart the means of an attribute's values lie in a latent, by Fisher's linear discriminant.

    A discriminator that learns by gradient steps follows an encoder that moves away from it: on CelebA at 64×64 a fresh
    linear probe read Male with 0.85 from latents of which the discriminator that had been trained along with them, four
    updates a step, told 0.72. Means and covariance settle within a few hundred records, and the best linear reader is a
    solution of linear equations in them.

    The separation of attribute a with k values is J = 1/k Σ_v (μ_v - μ̄)ᵀ Σ⁻¹ (μ_v - μ̄): μ_v the mean latent of those
    of value v, μ̄ the mean of the μ_v, so that rare values count alike, Σ the covariance of all. It is 0 when no linear
    reader can tell; of a binary attribute with equally likely values whose latents are Gaussian, 0.5 lets one be right
    in 84 of 100 cases, 0.1 in 63. A continuous attribute counts as its two ends, each record in proportion.

    What a curved reader could make of a latent z is seen through fixed random features, max(0, (z - mean) R): beside z
    itself they are what a network with one hidden layer starts from.

    All state is buffers, sums that fade: every rank keeps the same, and a checkpoint holds them.

    Args:
        size: numbers of a latent.
        num_hidden: random features beside them.
        half_life: images after which an old one counts half.
        shrinkage: this times the mean variance is added to each number's own.

    Raises:
        ValueError: latent and features are too many for their covariance; half_life or shrinkage is not positive.

    Source: Fisher 1936, doi:10.1111/j.1469-1809.1936.tb02137.x; several values: Rao 1948, section 7; random features:
    Rahimi, Recht 2008, "Weighted sums of random kitchen sinks".
    """

    def __init__(
        self, attributes: Attributes, size: int, half_life: int, num_hidden: int = 0, shrinkage: float = 0.1
    ) -> None:
        super().__init__()
        if size + num_hidden > _WIDEST:
            raise ValueError(
                f"a latent of {size:,} numbers and {num_hidden:,} features are too many for their covariance; "
                f"{_WIDEST:,} are the most"
            )
        if half_life < 1 or shrinkage <= 0:
            raise ValueError(f"half_life {half_life} and shrinkage {shrinkage:g} must be positive")
        self.slices = attributes.code_slices()
        self.half_life, self.shrinkage = half_life, shrinkage
        chance = torch.Generator().manual_seed(0)  # on every rank the same
        self.register_buffer("projection", torch.randn(size, num_hidden, generator=chance) / size**0.5)
        width, size = attributes.code_width, size + num_hidden
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("products", torch.zeros(size, size, dtype=torch.float64))
        self.register_buffer("value_counts", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("value_totals", torch.zeros(width, size, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, attributes: Attributes, latent: Tensor, labels: Tensor, reduce_sum: ReduceSum) -> None:
        """Take note of a batch over all ranks, in train mode. latent: [N, size]. labels: [N, A], -1 = unknown."""
        if not self.training:
            return
        latent = self._features(latent).double()
        members = attributes.members(labels).double()
        sums = (
            latent.new_full((1,), len(latent)), latent.sum(0), latent.T @ latent, members.sum(0), members.T @ latent,
        )  # fmt: skip
        flat = reduce_sum(torch.cat([part.reshape(-1) for part in sums]))
        sound = flat.isfinite().all()  # over all ranks; what is not is left out, without waiting for the device
        fade = torch.where(sound, 0.5 ** (flat[0] / self.half_life), 1.0)
        flat = torch.where(sound, flat, 0.0)
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
        """What the moments so far come to; 0 of an attribute that has a value which was not seen."""
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
        factor, _ = torch.linalg.cholesky_ex(covariance)  # of what is not finite it makes no error, but what is not finite
        directions = torch.cholesky_solve(apart.T, factor).T
        each = (directions * apart).sum(1)
        separations = torch.stack([each[part].mean() for part in self.slices])
        return Solution(mean, directions * weights[:, None], separations)

    def read(self, attributes: Attributes, latent: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each record's part of the separations [N], and these [A], by the moments so far. As `estimates` and `solve`."""
        solution = self.solve()
        return self.estimates(solution, attributes, latent, labels), solution.separations

    def estimates(self, solution: Solution, attributes: Attributes, latent: Tensor, labels: Tensor) -> Tensor:
        """What each record adds to the sum of all separations, as far as its own latent goes: its mean over a batch is
        an unbiased estimate of it, and its gradient moves the means of values together.

        Args:
            latent: [N, size], with gradients. labels: [N, A].

        Returns:
            [N], float64 where the latent is and float32 else; of either sign.
        """
        latent = self._features(latent)
        mean, directions, _ = (part.to(latent.dtype) for part in solution)
        with torch.autocast(latent.device.type, enabled=False):
            return (((latent - mean) @ directions.T) * attributes.members(labels)).sum(1)
