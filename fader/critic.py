"""A critic of latents that is solved, not learnt: what a linear reader could make of them, from running moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fader.attributes import Attributes
from fader.layers import wide
from fader.method import ReduceSum

_WIDEST = 4096  # their covariance takes 128 MiB, and a second or more of a CPU core to solve


class Solution(NamedTuple):
    """All float64, F = size, or 2 size + num_pairs with folds.

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

    What a curved reader could make of a latent is seen through features beside it: with u_i its numbers, standardised,
    the folds |u_i|, and the folds |u_i ± u_j| / √2 of some pairs, drawn once. Against the linear reader alone an encoder
    hides what it knows in them: on CelebA, when a fresh linear probe read Male with 0.65, one of latents and folds read 0.83.

    All state is buffers, sums that fade: every rank keeps the same, and a checkpoint holds them. What was observed since
    they were last asked for is taken into them then: one matrix product, and one sum over ranks.

    Args:
        size: numbers of a latent.
        num_pairs: of numbers whose folds it sees, beside those of each number; None = no folds, a linear reader.
        half_life: images after which an old one counts half.
        shrinkage: this times its own variance is added to each feature's.

    Raises:
        ValueError: the features are too many for their covariance; half_life or shrinkage is not positive.

    Source: Fisher 1936, doi:10.1111/j.1469-1809.1936.tb02137.x; several values: Rao 1948, section 7.
    """

    def __init__(
        self, attributes: Attributes, size: int, half_life: int, num_pairs: int | None = None, shrinkage: float = 0.1
    ) -> None:
        super().__init__()
        features = size if num_pairs is None else 2 * size + num_pairs
        if features > _WIDEST:
            raise ValueError(
                f"a latent of {size:,} numbers has {features:,} features here, too many for their covariance; "
                f"{_WIDEST:,} are the most"
            )
        if half_life < 1 or shrinkage <= 0:
            raise ValueError(f"half_life {half_life} and shrinkage {shrinkage:g} must be positive")
        if num_pairs and size < 2:
            raise ValueError("a latent of one number has no pairs")
        self.size, self.folds, self.slices = size, num_pairs is not None, attributes.code_slices()
        self.half_life, self.shrinkage = half_life, shrinkage
        chance = torch.Generator().manual_seed(0)  # on every rank the same
        first = torch.randint(0, size, (num_pairs or 0,), generator=chance)
        other = (first + torch.randint(1, max(size, 2), first.shape, generator=chance)) % size
        self.register_buffer("pairs", torch.stack([first, other]))
        self.register_buffer("signs", torch.randint(0, 2, first.shape, generator=chance) * 2 - 1)
        width = attributes.code_width
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("products", torch.zeros(features, features, dtype=torch.float64))
        self.register_buffer("value_counts", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("value_totals", torch.zeros(width, features, dtype=torch.float64))
        self._waiting: list[tuple[Tensor, Tensor]] = []  # latents and members, until `solve`

    @torch.no_grad()
    def observe(self, attributes: Attributes, latent: Tensor, labels: Tensor) -> None:
        """Take note of this rank's share of a batch, in train mode. latent: [N, size]. labels: [N, A], -1 = unknown."""
        if self.training:
            self._waiting.append((wide(latent), attributes.members(labels)))

    def _take_in(self, reduce_sum: ReduceSum) -> None:
        """Move what waits into the moments; nothing of it where any rank's is not finite. All ranks have some, or none."""
        if not self._waiting:
            return
        latent, members = (torch.cat(parts) for parts in zip(*self._waiting))
        self._waiting.clear()
        features, members = self._features(latent).double(), members.double()
        sums = (
            features.new_tensor([len(features)]), features.sum(0), features.T @ features, members.sum(0), members.T @ features,
        )  # fmt: skip
        flat = reduce_sum(torch.cat([part.reshape(-1) for part in sums]))
        fade = 0.5 ** (flat[0] / self.half_life)
        sound = flat.isfinite().all()
        kept = (self.count, self.total, self.products, self.value_counts, self.value_totals)
        for old, new in zip(kept, flat.split([part.numel() for part in kept])):
            old.copy_(torch.where(sound, old * fade + new.view_as(old), old))

    def _features(self, latent: Tensor) -> Tensor:
        """[N, size] to [N, F], at least float32: the latent, its folds, its pairs' folds."""
        latent = wide(latent)
        if not self.folds:
            return latent
        count = self.count.clamp(min=1)
        middle = self.total[: self.size] / count
        variance = self.products.diagonal()[: self.size] / count - middle.square()
        spread = torch.where(self.count > 0, variance.clamp(min=1e-6).sqrt(), 1.0)
        with torch.autocast(latent.device.type, enabled=False):
            unit = (latent - middle.to(latent.dtype)) / spread.to(latent.dtype)
            pairs = (unit[:, self.pairs[0]] + self.signs * unit[:, self.pairs[1]]) / 2**0.5
            return torch.cat([latent, unit.abs(), pairs.abs()], 1)

    @torch.no_grad()
    def solve(self, reduce_sum: ReduceSum) -> Solution:
        """What the moments so far come to, over all ranks; 0 of an attribute that has a value which was not seen."""
        self._take_in(reduce_sum)
        count = self.count.clamp(min=1)
        mean = self.total / count
        covariance = self.products / count - torch.outer(mean, mean)
        covariance.diagonal().mul_(1 + self.shrinkage).add_(1e-6)
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
