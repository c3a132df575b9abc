"""Counts how often training saw each value of each attribute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fader.attributes import Attributes
from fader.method import ReduceSum


class LabelCounts(nn.Module):
    """Counts how often training saw each value of each attribute, over all ranks. An observer.

    The counts start at one each, so that none is 0.
    """

    def __init__(self, attributes: Attributes) -> None:
        super().__init__()
        self.slices = attributes.code_slices()
        self.register_buffer("counts", torch.ones(attributes.code_width, dtype=torch.float64))

    @torch.no_grad()
    def add(self, attributes: Attributes, labels: Tensor, reduce_sum: ReduceSum) -> None:
        """Count a batch of labels [N, A] of every rank; unknown ones, and a batch that is not finite, are left out."""
        counts = reduce_sum(attributes.members(labels).sum(0).to(self.counts.dtype))
        self.counts += torch.where(counts.isfinite().all(), counts, 0.0)

    def log_frequencies(self) -> list[Tensor]:
        """One [k] float32 block an attribute."""
        return [(self.counts[part] / self.counts[part].sum()).log().float() for part in self.slices]
