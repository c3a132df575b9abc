"""Records become a Batch: draws, flip, normalisation and augmentation.

This comes after every decoder, so that decoders differ in nothing but decoding.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fader.draws import Draws
from fader.method import Batch
from pipeline.images import flip, to_float
from pipeline.loading.augmentation import augmented
from pipeline.loading.plan import Request, share

Pixels = Tensor | Sequence[np.ndarray]
"""uint8 pictures [N, S, S, C]; on the CPU also N of them [S, S, C], wherever they lie."""

_BUFFERS_KEPT = 4  # batches of floats whose memory waits to be used again
_ALONE = 32_767  # elements up to which torch works in the calling thread alone
_TOGETHER = 200_000  # elements that are worth several threads and stay in a core's cache as floats


def finish(
    request: Request,
    pixels: Pixels | None,
    labels: Tensor,
    rows: Tensor,
    *,
    seed: int,
    rank: int,
    world_size: int,
    buffers: Buffers,
) -> Batch:
    """Make one rank's Batch of pixels and labels, in the same way for every decoder.

    Args:
        request: the records of the global batch, and what is wanted of them.
        pixels: [N, S, S, C] uint8, this rank's share; None when the request has no images.
        labels: [n, A] float, of the whole split.
        rows: [B] int64, `request.rows` on the device of `labels`.
        seed: of the run, with its salt.
        buffers: where pictures on the CPU go.

    Returns:
        The batch, on the device of `labels`.
    """
    index = share(rows, rank, world_size)
    draws = Draws.of(seed, request.stream, request.draw, index)
    attributes = labels.index_select(0, rows)
    known = (attributes >= 0).sum(0).to(torch.float32) / world_size
    images = None
    if pixels is not None:
        images = normalised(pixels, draws.uniform("flip") < 0.5 if request.flip else None, buffers)
        if request.augment:
            images = augmented(images, draws, request.augment)
    records = len(request.rows)
    size = torch.full((), records / world_size, device=rows.device)
    return Batch(images, share(attributes, rank, world_size), index, draws, size, known, records)


class Buffers:
    """Memory for batches of floats on the CPU, which is lent again when nobody holds the batch any more.

    It is kept because a page that is new to the process costs more than the floats that are written to it. Several
    threads may use it.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=_BUFFERS_KEPT)

    def floats(self, *shape: int) -> np.ndarray:
        """Return an array of any content, whose memory is lent until the last reference to it is gone."""
        size = math.prod(shape)
        if not size:
            return np.empty(shape, np.float32)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(size, np.float32)
        if not size <= len(memory) <= 2 * size:
            memory = np.empty(size, np.float32)
        lent = np.frombuffer(memory.data, np.float32, size)  # not memory[:size], whose views keep `memory` and not it
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return lent.reshape(shape)


def normalised(pixels: Pixels, mirrored: Tensor | None, buffers: Buffers) -> Tensor:
    """Return `to_float` of the pictures, with the marked ones mirrored left to right.

    On the CPU it goes picture by picture, because a picture stays in the core's cache. Pictures that were decoded just
    now are done in the calling thread alone, because torch's threads spin while they wait for a core that a decoder
    has, which cut streaming to a third. Pictures that were kept are done by all of torch's threads, because nobody
    decodes then.

    Args:
        pixels: [N, S, S, C] uint8; on the CPU a tensor was decoded just now, a sequence of arrays was kept.
        mirrored: [N] bool; None mirrors none.

    Returns:
        [N, C, S, S] float32 in [-1, 1], stored pixel by pixel (channels last), the same to the bit either way.
    """
    if isinstance(pixels, Tensor) and pixels.device.type != "cpu":
        planes = pixels.permute(0, 3, 1, 2)
        return to_float(planes if mirrored is None else flip(planes, mirrored))
    sides = itertools.repeat(False, len(pixels)) if mirrored is None else mirrored.tolist()
    if not isinstance(pixels, Tensor):
        return _normalised_by_all_threads(pixels, list(sides), buffers).permute(0, 3, 1, 2)
    images = buffers.floats(*pixels.shape)
    for image, picture, mirror in zip(images, pixels.numpy(), sides):
        image[...] = _mirror(picture) if mirror else picture
        image /= np.float32(127.5)
        image -= np.float32(1)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _normalised_by_all_threads(pictures: Sequence[np.ndarray], sides: list[bool], buffers: Buffers) -> Tensor:
    """[N, S, S, C]: `normalised` of pictures on the CPU, a few at a time, so that each thread has enough to do."""
    images = torch.from_numpy(buffers.floats(len(pictures), *pictures[0].shape))
    together = max(1, _TOGETHER // pictures[0].size)
    for start in range(0, len(pictures), together):
        part = images[start : start + together]
        for image, picture, mirror in zip(part, pictures[start:], sides[start:]):
            source = torch.from_numpy(picture)
            image.copy_(_flipped(source) if mirror else source)
        part.div_(127.5).sub_(1)
    return images


def _mirror(picture: np.ndarray) -> np.ndarray:
    """Mirror a uint8 picture [S, S, C] left to right, in the calling thread.

    Torch does it, eight times as fast as numpy where channels lie side by side, in parts so small that its other
    threads stay asleep.
    """
    whole = torch.from_numpy(picture)
    rows = len(picture) if torch.get_num_threads() == 1 else max(1, _ALONE // picture[0].size)
    parts = [_flipped(part) for part in whole.split(rows)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy()


def _flipped(picture: Tensor) -> Tensor:
    """Mirror [S, S, C] left to right as a batch in channels-last order, for which torch has a fast kernel."""
    return picture.permute(2, 0, 1)[None].flip(-1)[0].permute(1, 2, 0)
