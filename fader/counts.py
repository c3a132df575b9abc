"""Counts how often training saw each value of each attribute."""

import torch
from torch import Tensor, nn

from fader.attributes import Attributes, Head
from fader.method import ReduceSum


class LabelCounts(nn.Module):
    """Counts how often training saw each value of each attribute, over all ranks. An observer.
    The counts start at one each, so that none is 0."""

    def __init__(self, attributes: Attributes) -> None:
        super().__init__()
        self.slices = attributes.code_slices()
        self.register_buffer("counts", torch.ones(attributes.code_width, dtype=torch.float64))

    @torch.no_grad()
    def add(self, attributes: Attributes, labels: Tensor, reduce_sum: ReduceSum) -> None:
        """Count a batch of labels [N, A] of every rank; unknown ones, and a batch that is not finite, are left out."""
        counts = reduce_sum(attributes.members(labels).sum(0).to(self.counts.dtype))
        self.counts += torch.where(counts.isfinite().all(), counts, 0.0)

    def shares(self, attributes: Attributes, labels: Tensor) -> Tensor:
        """[N, A] float32: how common each label's value is in what training saw. 1 = as common as the others of its attribute.
        An unknown label stands for 0."""
        values = (attribute.hard(labels[:, j]).clamp(min=0) for j, attribute in enumerate(attributes))
        counts = (self.counts[part] for part in self.slices)
        return torch.stack([(seen / seen.mean()).float()[value] for seen, value in zip(counts, values)], 1)

    def prior(self, attributes: Attributes, head: Head) -> Tensor:
        """[logits_width(head)] float32: what the frequencies of values add to logits; 0 for a continuous attribute.
        Logits to which it was added in training are without it those of equally likely values, and the other way round.
        Source: Menon et al. 2021, arXiv:2007.07314, logit adjustment with τ = 1."""
        parts = []
        for attribute, part in zip(attributes, self.slices):
            log = (self.counts[part] / self.counts[part].sum()).log().float()
            log = log if attribute.logits_width(head) > 1 else log[1:] - log[:1]
            parts.append(torch.zeros_like(log) if attribute.kind == "continuous" else log)
        return torch.cat(parts)
