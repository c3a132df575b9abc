"""The plan: which records make batch k of a stream, and how records become a Batch. The Loader protocol.

A plan is a pure function of (seed, salt, stream, draw, size), so nothing about a loader has to be restored: a resumed
run asks for draw k and gets what the unbroken run got, on any number of ranks. Ranks cut the global batch afterwards.

Flip and normalisation stand here, once, after every decoder, so that decoders differ in nothing but decoding.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fader.attributes import Attributes
from fader.draws import Draws, key_of
from fader.method import Batch
from pipeline.images import Preprocessing, flip, to_float

if TYPE_CHECKING:
    from pipeline.shards import Split

Rows = TypeVar("Rows", np.ndarray, Tensor)

_EPOCHS_KEPT = 8  # a few streams at a time, two epochs each when a batch spans their border


@dataclass(frozen=True, eq=False)
class Request:
    """One global batch to be made.

    Args:
        stream: the sequence of batches it belongs to.
        draw: which batch of the stream it is; with the stream it keys the batch's random numbers.
        rows: [B] int64 rows of the split, in order: the whole global batch, not one rank's share.
        images: decode images; False for a phase that reads labels only.
        flip: mirror each record left-right with probability one half.
    """

    stream: str
    draw: int
    rows: np.ndarray
    images: bool = True
    flip: bool = False


class Plan:
    """Which rows of a split make draw k of a stream.

    A stream is an endless line of epochs; draw k with batch size B takes positions k·B … (k+1)·B - 1 of it. Without
    replacement each epoch is a permutation, so every record is read exactly once an epoch whatever B is; with
    replacement each position is an independent uniform row.

    Numbers come from Philox raw words (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose stream
    numpy promises to keep over its versions; `Generator.permutation` carries no such promise.

    Args:
        size: records in the split.
        seed, salt: of the run; other values give other, independent orders.
        window: shards read together. None: a full shuffle. Otherwise shards are permuted and taken `window` at a time,
            and records are permuted inside each window. A window over all shards is a full shuffle.
        shard_of: [size] shard number of each row; needed with a window.
        replacement: draw rows independently instead of by permutations.

    Raises:
        ValueError: size below 1, a window below 1, without `shard_of`, or with replacement.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        salt: int = 0,
        window: int | None = None,
        shard_of: np.ndarray | None = None,
        replacement: bool = False,
    ) -> None:
        if size < 1:
            raise ValueError(f"a plan over {size} records is empty; give it a split that has some")
        self.size, self.seed, self.salt, self.replacement = int(size), seed, salt, replacement
        self._shards: list[np.ndarray] = []
        self._window = 0
        if window is not None:
            if window < 1:
                raise ValueError(f"window is {window} shards; it must be at least 1, or none for a full shuffle")
            if replacement:
                raise ValueError("a window orders a pass over the shards; sampling with replacement has none: drop one")
            if shard_of is None or len(shard_of) != size:
                found = "no shard numbers" if shard_of is None else f"{len(shard_of)} shard numbers"
                raise ValueError(f"a window needs the shard of each of {size} records, got {found}")
            _, counts = np.unique(shard_of, return_counts=True)
            if window < len(counts):
                order = np.argsort(shard_of, kind="stable")
                self._shards = np.split(order, np.cumsum(counts)[:-1])
                self._window = window
        self._epochs: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()  # loaders may ask from a thread of their own

    def rows(self, stream: str, draw: int, batch_size: int) -> np.ndarray:
        """[batch_size] int64: the global batch of this draw, in order.

        Raises:
            ValueError: batch_size below 1 or draw below 0.
        """
        if batch_size < 1 or draw < 0:
            raise ValueError(f"draw {draw} with batch size {batch_size}; they begin at 0 and 1")
        start, stop = draw * batch_size, (draw + 1) * batch_size
        out = np.empty(batch_size, np.int64)
        for epoch in range(start // self.size, (stop - 1) // self.size + 1):
            first = epoch * self.size
            low, high = max(start, first), min(stop, first + self.size)
            out[low - start : high - start] = self._epoch(stream, epoch)[low - first : high - first]
        return out

    def _epoch(self, stream: str, epoch: int) -> np.ndarray:
        """[size] integers: the rows at positions epoch·size … (epoch+1)·size - 1 of the stream."""
        with self._lock:
            key = (stream, epoch)
            if key not in self._epochs:
                order = self._order(stream, epoch)
                self._epochs[key] = order.astype(np.int32) if self.size < 2**31 else order
                while len(self._epochs) > _EPOCHS_KEPT:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(key)
            return self._epochs[key]

    def _order(self, stream: str, epoch: int) -> np.ndarray:
        key = key_of("plan", self.seed, self.salt, stream, epoch) & 0xFFFFFFFFFFFFFFFF
        words = np.random.Philox(np.random.SeedSequence(key)).random_raw
        if self.replacement:
            return (words(self.size) % np.uint64(self.size)).astype(np.int64)  # bias below size / 2^64
        if not self._window:
            return _permutation(words, self.size)
        shards = _permutation(words, len(self._shards))
        windows = [shards[i : i + self._window] for i in range(0, len(shards), self._window)]
        parts = []
        for window in windows:
            rows = np.concatenate([self._shards[shard] for shard in window])
            parts.append(rows[_permutation(words, len(rows))])
        return np.concatenate(parts)


def _permutation(words, size: int) -> np.ndarray:
    """[size] int64: the order of `size` random 64-bit words; two are equal with probability below size² / 2^65."""
    return np.argsort(words(size), kind="stable")


def share(rows: Rows, rank: int, world_size: int) -> Rows:
    """This rank's contiguous part of a global batch: in rank order they are the whole, sizes differ by at most one.

    Raises:
        ValueError: rank is not one of world_size.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}; ranks run from 0 to world_size - 1")
    return rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size]


def largest_share(batch_size: int, world_size: int) -> int:
    """Records of the largest share of a global batch."""
    return -(-batch_size // world_size)


def sequential(size: int, batch_size: int, stream: str = "eval") -> Iterator[Request]:
    """Each row once, in order, never flipped; the last batch holds what is left."""
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be at least 1")
    for draw, start in enumerate(range(0, size, batch_size)):
        yield Request(stream, draw, np.arange(start, min(start + batch_size, size), dtype=np.int64))


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
    """One rank's Batch of decoded pixels and labels: draws, flip, normalisation. The same for every decoder.

    Args:
        request: what was asked.
        pixels: [N, S, S, C] uint8, this rank's share; None when the request has no images.
        labels: [n, A] float, of the whole split.
        rows: [B] int64, `request.rows` on the device of `labels`.
        seed: of the run, with its salt.

    Returns:
        The batch, on the device of `labels`.
    """
    index = share(rows, rank, world_size)
    draws = Draws(seed, request.stream, request.draw, index)
    attributes = labels.index_select(0, rows)
    known = (attributes >= 0).sum(0).to(torch.float32) / world_size
    images = None
    if pixels is not None:
        images = normalised(pixels, draws.uniform("flip") < 0.5 if request.flip else None)
    size = len(request.rows) / world_size
    return Batch(images, share(attributes, rank, world_size), index, draws, size, known)


def normalised(pixels: Tensor, mirrored: Tensor | None) -> Tensor:
    """`to_float` of the pictures, those marked mirrored left to right.

    On the CPU it goes picture by picture, which stays in the core's cache, and in numpy, which uses the calling thread
    alone: torch's threads, spinning while they wait for a core that a decoder has, cut streaming to a third.

    Args:
        pixels: [N, S, S, C] uint8.
        mirrored: [N] bool; None mirrors none.

    Returns:
        [N, C, S, S] float32 in [-1, 1], the same to the bit either way.
    """
    planes = pixels.permute(0, 3, 1, 2)
    if pixels.device.type != "cpu":
        return to_float(planes if mirrored is None else flip(planes, mirrored))
    images = np.empty(planes.shape, np.float32)
    sides = itertools.repeat(False) if mirrored is None else mirrored.tolist()
    for image, source, mirror in zip(images, planes.numpy(), sides):
        image[...] = source[..., ::-1] if mirror else source
        image /= np.float32(127.5)
        image -= np.float32(1)
    return torch.from_numpy(images)


class Loader(Protocol):
    """Makes the batches a plan asks for."""

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """This rank's share of each request, in order.

        A loader may work ahead: it may read several requests more than it has given batches. Closing the iterator ends
        all work and all threads begun for it.

        Raises:
            ValueError: a record does not decode; the message names its key and shard.
        """
        ...


class SplitLoader:
    """What the loaders of one split share: labels on the device, this rank's rows, naming a bad record.

    Args:
        split: what to read.
        attributes: the columns of `Batch.attributes`, in order.
        preprocessing: crop, size and channels.
        seed: of the run, with its salt; keys the draws.
        rank, world_size: which share of each global batch to make.
        device: where batches stand.
        threads: decoding threads.
        prefetch: batches made ahead of the one being used.

    Raises:
        ValueError: the split lacks an attribute, the crop does not take a picture's size, threads or prefetch is below
            1, or rank is not one of world_size.
    """

    def __init__(
        self,
        split: Split,
        attributes: Attributes,
        preprocessing: Preprocessing,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device = torch.device("cpu"),
        threads: int = 2,
        prefetch: int = 3,
    ) -> None:
        if threads < 1 or prefetch < 1:
            raise ValueError(f"{threads} threads and {prefetch} batches ahead; a loader needs at least 1 of each")
        share(split.shard, rank, world_size)
        self.split, self.attributes, self.preprocessing = split, attributes, preprocessing
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.device, self.threads, self.prefetch = torch.device(device), threads, prefetch
        self.boxes = preprocessing.boxes(split.width, split.height)
        self.labels = torch.from_numpy(np.ascontiguousarray(split.columns(attributes))).to(self.device)

    def rows(self, request: Request) -> Tensor:
        """The request's rows [B] on the device, without waiting for what the device is doing."""
        rows = torch.from_numpy(request.rows)
        return rows if self.device.type == "cpu" else rows.pin_memory().to(self.device, non_blocking=True)

    def finish(self, request: Request, rows: Tensor, pixels: Tensor | None) -> Batch:
        """See `finish`; rows [B] and pixels [N, S, S, C] are on the device."""
        return finish(
            request, pixels, self.labels, rows, seed=self.seed, rank=self.rank, world_size=self.world_size
        )

    def unreadable(self, row: int, error: Exception) -> ValueError:
        """What to raise for a record that does not decode."""
        shard = self.split.shards[self.split.shard[row]]
        return ValueError(
            f"{self.split.keys[row]} in {shard} does not decode: {error}; "
            f"run 'fader verify {shard.parent}' to see what else is damaged, then 'fader prepare' again"
        )
