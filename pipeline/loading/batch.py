"""Records become a Batch: draws, flip, normalisation and augmentation.

This comes after every decoder, so that decoders differ in nothing but decoding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fader.draws import Draws
from fader.method import Batch
from pipeline.images import flip, to_float
from pipeline.loading.augmentation import augmented
from pipeline.loading.plan import Request, share


def finish(
    request: Request, pixels: Tensor | None, labels: Tensor, rows: Tensor, *, seed: int, rank: int, world_size: int,
) -> Batch:
    """Make one rank's Batch of pixels and labels, in the same way for every decoder, on the device of `labels`.

    pixels: [N, S, S, C] uint8, this rank's share; None when the request has no images. labels: [n, A] float, of the whole
    split. rows: [B] int64, `request.rows` on the device of `labels`. seed: of the run, with its salt.
    """
    index = share(rows, rank, world_size)
    draws = Draws.of(seed, request.stream, request.draw, index)
    attributes = labels.index_select(0, rows)
    known = (attributes >= 0).sum(0).to(torch.float32) / world_size
    images = None
    if pixels is not None:
        images = _floats(pixels, draws.uniform("flip") < (0.5 if request.flip else 0.0))
        if request.augment:
            images = augmented(images, draws, request.augment)
    records = len(request.rows)
    size = torch.full((), records / world_size, device=rows.device)
    return Batch(images, share(attributes, rank, world_size), index, draws, size, known, records)


def _floats(pixels: Tensor, mirrored: Tensor) -> Tensor:
    """Return `to_float` of pictures [N, S, S, C], those of the mask `mirrored` [N] mirrored left to right. On the CPU the
    calling thread does it alone, because torch's threads spin while they wait for a decoder's core, which cuts streaming
    to a third.
    """
    if pixels.device.type != "cpu":
        return to_float(flip(pixels.permute(0, 3, 1, 2), mirrored))
    images = np.empty(pixels.shape, np.float32)
    for image, picture, mirror in zip(images, pixels.numpy(), mirrored.tolist()):
        image[...] = picture[:, ::-1] if mirror else picture
        image /= np.float32(127.5)
        image -= np.float32(1)
    return torch.from_numpy(images).permute(0, 3, 1, 2)
