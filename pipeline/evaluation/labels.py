"""The labels that tables ask for: known values, each change of one attribute, and each slider."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fader.attributes import Attribute, Attributes


def hard(attribute: Attribute, labels: Tensor) -> Tensor:
    """[N] int64 label among the attribute's values, -1 if unknown; a continuous one stands at its nearer end."""
    if attribute.kind == "continuous":
        labels = torch.where(labels < 0, labels, (labels >= 0.5).to(labels.dtype))
    return labels.long()


def swaps(attributes: Attributes, labels: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Every change of one attribute to another of its values, for all records at once.

    Step s of an attribute with k values moves each record from its label v to (v + s) mod k, so k - 1 decodes serve all
    ordered pairs. Records whose label is unknown are moved too, and not counted by anyone.

    Args:
        labels: [N, A].

    Yields:
        column, step, the changed labels [N, A], the value asked for [N] int64.
    """
    for j, attribute in enumerate(attributes):
        start = hard(attribute, labels[:, j]).clamp(min=0)
        for step in range(1, attribute.k):
            target = (start + step) % attribute.k
            changed = labels.clone()
            changed[:, j] = target.to(labels.dtype)
            yield j, step, changed, target


def slider_values(attributes: Attributes) -> Iterator[tuple[int, Attribute, int, int | None]]:
    """Every slider: column, attribute, the value it raises, and that value again as `category` when k-way."""
    for j, attribute in enumerate(attributes):
        for value in attribute.values if attribute.kind == "k-way" else (1,):
            yield j, attribute, value, value if attribute.kind == "k-way" else None
