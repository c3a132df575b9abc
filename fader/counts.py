"""What training has seen of the labels, and how much a discriminator reads of them: networks without weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fader.attributes import Attributes
from fader.method import ReduceSum


class LabelCounts(nn.Module):
    """How often training saw each value of each attribute, over all ranks; starts at one each, so that none is 0."""

    def __init__(self, attributes: Attributes) -> None:
        super().__init__()
        self.slices = attributes.code_slices()
        self.register_buffer("counts", torch.ones(attributes.code_width, dtype=torch.float64))

    @torch.no_grad()
    def add(self, attributes: Attributes, labels: Tensor, reduce_sum: ReduceSum) -> None:
        """Count a batch of labels [N, A] of every rank, in train mode; unknown ones are left out."""
        if not self.training:
            return
        self.counts += reduce_sum(attributes.members(labels).sum(0).to(self.counts.dtype))

    def log_frequencies(self) -> list[Tensor]:
        """One [k] float32 block an attribute."""
        return [(self.counts[part] / self.counts[part].sum()).log().float() for part in self.slices]

    def entropies(self) -> Tensor:
        """[A] float64, nats: what labels drawn with the counted frequencies hold. ln 2 at first for a binary one."""
        parts = [self.counts[part] / self.counts[part].sum() for part in self.slices]
        return torch.stack([-(p * p.log()).sum() for p in parts])


class LeakControl(nn.Module):
    """A factor in [floor, 1] on λ that holds what a discriminator reads of the labels at a target.

    The leak of an attribute is the share of its labels' entropy H that the discriminator's cross-entropy CE takes away,
    1 - CE / H: 0 when the latent tells it nothing, 1 when it tells everything, below 0 when the discriminator is fooled.
    Above the target the logarithm of the factor grows, below it falls, in proportion to the distance and to the images
    seen. All of it is buffers: a checkpoint holds it, and every rank keeps the same.

    Args:
        target: the leak to hold, mean over the attributes.
        images: images over which a leak one unit above the target multiplies the factor by e.
        floor: the factor's first and smallest value.

    Raises:
        ValueError: an attribute is continuous (its loss is no cross-entropy); target, images or floor out of range.
    """

    def __init__(self, attributes: Attributes, target: float, images: int, floor: float = 1e-3) -> None:
        super().__init__()
        continuous = [attribute.name for attribute in attributes if attribute.kind == "continuous"]
        if continuous:
            raise ValueError(f"λ by feedback needs cross-entropies; {', '.join(continuous)} is continuous")
        if not 0 <= target < 1 or images < 1 or not 0 < floor < 1:
            raise ValueError(
                f"target {target}, images {images}, floor {floor}: a target is in [0, 1), images are positive and a "
                "floor is between 0 and 1"
            )
        self.target, self.images, self.floor = target, images, floor
        self.label_counts = LabelCounts(attributes)
        self.register_buffer("log_factor", torch.tensor(floor, dtype=torch.float64).log())

    @torch.no_grad()
    def observe(
        self, attributes: Attributes, losses: Tensor, labels: Tensor, known: Tensor, reduce_sum: ReduceSum
    ) -> None:
        """Steer by a discriminator's losses on a batch, over all ranks, in train mode.

        Args:
            losses: [A] nats, sums over known records divided by `known`, as `Attributes.losses` gives them.
            labels: [N, A], -1 = unknown.
            known: [A] divisors of `losses`.
        """
        if not self.training:
            return
        count = (labels >= 0).sum(0).double()
        sums = reduce_sum(torch.stack([losses.double() * known.double().clamp(min=1e-6), count]))
        self.label_counts.add(attributes, labels, reduce_sum)
        above = sums[1] * (1 - self.target) - sums[0] / self.label_counts.entropies()
        self.log_factor += above.mean() / self.images
        self.log_factor.clamp_(math.log(self.floor), 0.0)

    def factor(self) -> Tensor:
        """Scalar float32 in [floor, 1]."""
        return self.log_factor.exp().float()
