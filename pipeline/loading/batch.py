"""Records become a Batch: draws, flip, normalisation and augmentation.

This comes after every decoder, so that decoders differ in nothing but decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fader.draws import Draws
from fader.method import Batch
from pipeline.images import flip, to_float
from pipeline.loading.augmentation import augmented
from pipeline.loading.plan import Request, share


def finish(
    request: Request,
    pixels: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    *,
    seed: int,
    rank: int,
    world_size: int,
) -> Batch:
    """Make one rank's Batch of pixels and labels, in the same way for every decoder.

    Args:
        request: the records of the global batch, and what is wanted of them.
        pixels: [N, S, S, C] uint8, this rank's share; None when the request has no images.
        labels: [n, A] float, of the whole split.
        rows: [B] int64, `request.rows` on the device of `labels`.
        seed: of the run, with its salt.

    Returns:
        The batch, on the device of `labels`.
    """
    index = share(rows, rank, world_size)
    draws = Draws.of(seed, request.stream, request.draw, index)
    attributes = labels.index_select(0, rows)
    known = (attributes >= 0).sum(0).to(torch.float32) / world_size
    images = None
    if pixels is not None:
        planes = pixels.permute(0, 3, 1, 2)
        images = to_float(flip(planes, draws.uniform("flip") < 0.5) if request.flip else planes)
        if request.augment:
            images = augmented(images, draws, request.augment)
    records = len(request.rows)
    size = torch.full((), records / world_size, device=rows.device)
    return Batch(images, share(attributes, rank, world_size), index, draws, size, known, records)
