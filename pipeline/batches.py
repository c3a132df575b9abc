"""The plan: which records make batch k of a stream, and how records become a Batch. The Loader protocol.

A plan is a pure function of (seed, salt, stream, draw, size), so nothing about a loader has to be restored: a resumed
run asks for draw k and gets what the unbroken run got, on any number of ranks. Ranks cut the global batch afterwards.

Flip, normalisation and augmentation stand here, once, after every decoder, so that decoders differ in nothing but
decoding.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fader.attributes import Attributes
from fader.draws import Draws, key_of
from fader.method import Batch
from pipeline.augmentation import augmented
from pipeline.config import AugmentConfig
from pipeline.images import Preprocessing, flip, to_float
from pipeline.remote import Ahead

if TYPE_CHECKING:
    from pipeline.quarantine import Quarantine
    from pipeline.shards import Split

Rows = TypeVar("Rows", np.ndarray, Tensor)
Words = Callable[[int], np.ndarray]  # so many random uint64

Pixels = Tensor | Sequence[np.ndarray]
"""uint8 pictures [N, S, S, C]; on the CPU also N of them [S, S, C], wherever they lie."""

_EPOCHS_KEPT = 8  # a few streams at a time, two epochs each when a batch spans their border
_BUFFERS_KEPT = 4  # batches of floats whose memory waits to be used again
_ALONE = 32_767  # elements up to which torch works in the calling thread alone
_TOGETHER = 200_000  # elements that are worth several threads and stay in a core's cache as floats


@dataclass(frozen=True, eq=False)
class Request:
    """One global batch to be made.

    Args:
        stream: the sequence of batches it belongs to.
        draw: which batch of the stream it is; with the stream it keys the batch's random numbers.
        rows: [B] int64 rows of the split, in order: the whole global batch, not one rank's share.
        images: decode images; False for a phase that reads labels only.
        flip: mirror each record left-right with probability one half.
        augment: move and colour each record by so much; None leaves the pictures alone.
    """

    stream: str
    draw: int
    rows: np.ndarray
    images: bool = True
    flip: bool = False
    augment: AugmentConfig | None = None


class Plan:
    """Which rows of a split make draw k of a stream.

    A stream is an endless line of epochs of `size` positions; draw k with batch size B takes positions k·B …
    (k+1)·B - 1 of it. Without replacement each epoch is a permutation, so every record is read exactly once an epoch
    whatever B is; with replacement each position is an independent row.

    With weights a record of weight w (their mean counts as 1) stands ⌊w⌋ or ⌈w⌉ times in an epoch, w times on average,
    by systematic sampling (Madow and Madow 1944, "On the theory of systematic sampling"): points one apart are laid
    over the weights, put end to end group by group and shuffled inside each, so a group's share of an epoch is exact to
    one record. With replacement each position is record i with probability w_i / size.

    Numbers come from Philox raw words (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose stream
    numpy promises to keep over its versions; `Generator.permutation` carries no such promise.

    Args:
        size: records in the split.
        seed, salt: of the run; other values give other, independent orders.
        window: shards read together. None: a full shuffle. Otherwise shards are permuted and taken `window` at a time,
            and records are permuted inside each window. A window over all shards is a full shuffle.
        shard_of: [size] shard number of each row; needed with a window.
        replacement: draw rows independently instead of by permutations.
        weights: [size] of the records, none below 0; None: all alike.
        groups: [size] integers, equal for records whose share of an epoch is to be exact together; None: one group.

    Raises:
        ValueError: size below 1, a window below 1, without `shard_of`, or with replacement; weights that are too few,
            negative, not finite or all zero.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        salt: int = 0,
        window: int | None = None,
        shard_of: np.ndarray | None = None,
        replacement: bool = False,
        weights: np.ndarray | None = None,
        groups: np.ndarray | None = None,
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
        if weights is not None:
            if weights.shape != (size,) or (groups is not None and groups.shape != (size,)):
                raise ValueError(f"{len(weights)} weights for {size} records; give one, and one group, for each")
            if not (np.isfinite(weights).all() and (weights >= 0).all() and (weights > 0).any()):
                raise ValueError("weights are finite, none below 0 and some above; these are not")
        self._weights, self._groups = weights, groups
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
        words = _words(self.seed, self.salt, stream, epoch)
        if self.replacement:
            return self._independent(words)
        times = None if self._weights is None else self._times(words)
        if not self._window:
            if times is None:
                return _permutation(words, self.size)
            return np.repeat(np.arange(self.size), times)[_permutation(words, self.size)]
        shards = _permutation(words, len(self._shards))
        windows = [shards[i : i + self._window] for i in range(0, len(shards), self._window)]
        parts = []
        for window in windows:
            rows = np.concatenate([self._shards[shard] for shard in window])
            rows = rows if times is None else np.repeat(rows, times[rows])
            parts.append(rows[_permutation(words, len(rows))])
        return np.concatenate(parts)

    def _independent(self, words: Words) -> np.ndarray:
        """[size] int64 rows, each by its weight."""
        if self._weights is None:
            return (words(self.size) % np.uint64(self.size)).astype(np.int64)  # bias below size / 2^64
        ends = np.cumsum(self._weights)
        return _at(ends, _uniform(words, self.size) * ends[-1])

    def _times(self, words: Words) -> np.ndarray:
        """[size] how often each row stands in the epoch; they sum to size."""
        assert self._weights is not None
        shuffle = words(self.size)
        line = np.argsort(shuffle, kind="stable") if self._groups is None else np.lexsort((shuffle, self._groups))
        ends = np.cumsum(self._weights[line])
        points = (np.arange(self.size) + _uniform(words, 1)) * (ends[-1] / self.size)
        return np.bincount(line[_at(ends, points)], minlength=self.size)


class TarPlan:
    """Which rows make draw k of a stream when each rank reads tars front to back.

    An epoch is the tars in an order of its own, shuffled as whole ones, end to end. Each rank reads one stretch of it,
    as long as the rank's shares of the batches that the epoch makes, so a stretch may begin or end inside a tar. As in
    `Plan`, epoch e is what stands at positions e·size … (e+1)·size - 1 of all batches: it has each record once, batches
    run on over its end, and draw k is a pure function, here of batch size and rank count, too.

    Args:
        shard_of: [size] shard number of each row, ascending.
        seed, salt: of the run; other values give other, independent orders.
        world_size: ranks that read.

    Raises:
        ValueError: no rows, rows that do not stand tar after tar, no ranks.
    """

    def __init__(self, shard_of: np.ndarray, seed: int, salt: int = 0, world_size: int = 1) -> None:
        if not len(shard_of):
            raise ValueError("a plan over 0 records is empty; give it a split that has some")
        if (np.diff(shard_of) < 0).any() or world_size < 1:
            raise ValueError(f"rows must stand tar after tar, for 1 rank or more; got {world_size} ranks")
        self.size, self.seed, self.salt, self.world_size = len(shard_of), seed, salt, world_size
        _, self._first, self._counts = np.unique(shard_of, return_index=True, return_counts=True)
        self._orders: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()

    def rows(self, stream: str, draw: int, batch_size: int) -> np.ndarray:
        """[batch_size] int64: the global batch of this draw, in order; what `share` gives a rank is what it reads next.

        Raises:
            ValueError: batch_size below 1 or draw below 0.
        """
        if batch_size < 1 or draw < 0:
            raise ValueError(f"draw {draw} with batch size {batch_size}; they begin at 0 and 1")
        edges = batch_size * np.arange(self.world_size + 1) // self.world_size
        shares, start = np.diff(edges), draw * batch_size
        places = np.arange(batch_size)
        rank = np.repeat(np.arange(self.world_size), shares)
        out = np.empty(batch_size, np.int64)

        def read_before(position: int) -> np.ndarray:
            """[ranks] how many of the positions before this one are each rank's."""
            return position // batch_size * shares + np.clip(position % batch_size - edges[:-1], 0, shares)

        for epoch in range(start // self.size, (start + batch_size - 1) // self.size + 1):
            first = epoch * self.size
            before = read_before(first)
            stretches = read_before(first + self.size) - before
            begins = np.cumsum(stretches) - stretches
            part = slice(max(first - start, 0), max(min(first + self.size - start, batch_size), 0))
            who = rank[part]
            read = draw * shares[who] + places[part] - edges[who] - before[who]
            out[part] = self._at(stream, epoch, begins[who] + read)
        return out

    def _at(self, stream: str, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The rows at these positions of an epoch's line of tars."""
        order = self._order(stream, epoch)
        ends = np.cumsum(self._counts[order])
        tar = np.searchsorted(ends, positions, side="right")
        return self._first[order[tar]] + positions - (ends[tar] - self._counts[order[tar]])

    def _order(self, stream: str, epoch: int) -> np.ndarray:
        """[tars] the order of the tars."""
        key = (stream, epoch)
        if key not in self._orders:
            self._orders[key] = _permutation(_words(self.seed, self.salt, stream, epoch), len(self._counts))
            while len(self._orders) > _EPOCHS_KEPT:
                self._orders.popitem(last=False)
        return self._orders[key]


def _words(seed: int, salt: int, stream: str, epoch: int) -> Words:
    key = key_of("plan", seed, salt, stream, epoch) & 0xFFFFFFFFFFFFFFFF
    return np.random.Philox(np.random.SeedSequence(key)).random_raw


def _at(ends: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Which stretch of a line each point lies on; `ends` are where the stretches end. One of length 0 holds none."""
    last = np.searchsorted(ends, ends[-1])  # rounding may put a point on the very end
    return np.minimum(np.searchsorted(ends, points, side="right"), last)


def _uniform(words: Words, size: int) -> np.ndarray:
    """[size] float64 on [0, 1) in steps of 2^-53."""
    return (words(size) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _permutation(words: Words, size: int) -> np.ndarray:
    """[size] int64: the order of `size` random 64-bit words; two are equal with probability below size² / 2^65."""
    return np.argsort(words(size), kind="stable")


def salted(seed: int, salt: int) -> int:
    """The seed of a run's random numbers after it was salted; salt 0 leaves it."""
    return key_of("salt", seed, salt) if salt else seed


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
    pixels: Pixels | None,
    labels: Tensor,
    rows: Tensor,
    *,
    seed: int,
    rank: int,
    world_size: int,
    buffers: Buffers,
) -> Batch:
    """One rank's Batch of pixels and labels: draws, flip, normalisation, augmentation. The same for every decoder.

    Args:
        request: what was asked.
        pixels: [N, S, S, C] uint8, this rank's share; None when the request has no images.
        labels: [n, A] float, of the whole split.
        rows: [B] int64, `request.rows` on the device of `labels`.
        seed: of the run, with its salt.
        buffers: where pictures on the CPU go.

    Returns:
        The batch, on the device of `labels`.
    """
    index = share(rows, rank, world_size)
    draws = Draws(seed, request.stream, request.draw, index)
    attributes = labels.index_select(0, rows)
    known = (attributes >= 0).sum(0).to(torch.float32) / world_size
    images = None
    if pixels is not None:
        images = normalised(pixels, draws.uniform("flip") < 0.5 if request.flip else None, buffers)
        if request.augment:
            images = augmented(images, draws, request.augment)
    size = len(request.rows) / world_size
    return Batch(images, share(attributes, rank, world_size), index, draws, size, known)


class Buffers:
    """Memory for batches of floats on the CPU, given out again when nobody holds the batch any more: a page that is new
    to the process costs more than the floats that are written to it. Safe from several threads."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=_BUFFERS_KEPT)

    def floats(self, *shape: int) -> np.ndarray:
        """An array of any content; its memory is lent until the last reference to it is gone."""
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
    """`to_float` of the pictures, those marked mirrored left to right.

    On the CPU it goes picture by picture, which stays in the core's cache. What was decoded just now is done in the
    calling thread alone: torch's threads, spinning while they wait for a core that a decoder has, cut streaming to a
    third. What was kept is done with all of torch's threads, for nobody decodes then.

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
    """A uint8 picture [S, S, C] left to right, in the calling thread.

    By torch, which does it eight times as fast as numpy where channels stand side by side; in parts so small that it
    leaves its other threads asleep.
    """
    whole = torch.from_numpy(picture)
    rows = len(picture) if torch.get_num_threads() == 1 else max(1, _ALONE // picture[0].size)
    parts = [_flipped(part) for part in whole.split(rows)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy()


def _flipped(picture: Tensor) -> Tensor:
    """[S, S, C] left to right; seen as a batch in channels-last order, which torch has a fast kernel for."""
    return picture.permute(2, 0, 1)[None].flip(-1)[0].permute(1, 2, 0)


class Loader(Protocol):
    """Makes the batches a plan asks for. seed: keys their draws; it may be set anew before each call of `batches`."""

    seed: int

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
        quarantine: where records go that do not decode, for others to stand in; None: they are an error.

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
        quarantine: Quarantine | None = None,
    ) -> None:
        if threads < 1 or prefetch < 1:
            raise ValueError(f"{threads} threads and {prefetch} batches ahead; a loader needs at least 1 of each")
        share(split.shard, rank, world_size)
        self.split, self.attributes, self.preprocessing = split, attributes, preprocessing
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.device, self.threads, self.prefetch = torch.device(device), threads, prefetch
        self.buffers = Buffers()
        self.quarantine = quarantine
        self.boxes = preprocessing.boxes(split.width, split.height)
        self.labels = torch.from_numpy(np.ascontiguousarray(split.columns(attributes))).to(self.device)

    def standing(self, rows: np.ndarray) -> np.ndarray:
        """Rows with what stands in for those that are known not to decode."""
        return rows if self.quarantine is None else self.quarantine.standing(rows)

    def rows(self, request: Request) -> Tensor:
        """The request's rows [B] on the device, without waiting for what the device is doing; those that do not decode
        replaced, so to be asked for when this rank's pictures are there. Labels alone are read of any record."""
        rows = torch.from_numpy(self.standing(request.rows) if request.images else request.rows)
        return rows if self.device.type == "cpu" else rows.pin_memory().to(self.device, non_blocking=True)

    def finish(self, request: Request, rows: Tensor, pixels: Pixels | None) -> Batch:
        """See `finish`; rows [B] and pixels [N, S, S, C] are on the device."""
        return finish(
            request, pixels, self.labels, rows, seed=self.seed, rank=self.rank, world_size=self.world_size,
            buffers=self.buffers,
        )

    def ahead(
        self, requests: Iterable[Request], needed: Callable[[np.ndarray], np.ndarray] = lambda rows: rows
    ) -> Iterator[Request]:
        """The same requests. Of a set that lies elsewhere, the tars of those to come are fetched meanwhile, as far ahead
        as two tars have records.

        Args:
            needed: those of some rows whose bytes will be read.
        """
        if self.split.remote is None:
            yield from requests
            return
        most, records = 2 * len(self.split) // len(self.split.shards), 0
        waiting: deque[Request] = deque()
        fetching = Ahead(self.split.remote)
        try:
            for request in requests:
                rows = needed(share(request.rows, self.rank, self.world_size)) if request.images else request.rows[:0]
                for number in np.unique(self.split.shard[rows]).tolist():
                    fetching.want(self.split.shards[number].name)
                waiting.append(request)
                records += len(request.rows)
                while records > most:
                    records -= len(waiting[0].rows)
                    yield waiting.popleft()
            yield from waiting
        finally:
            fetching.close()

    def leave_out(self, row: int, error: Exception) -> None:
        """Put a record that does not decode into quarantine.

        Raises:
            ValueError: there is none, or there are too many in it.
        """
        if self.quarantine is not None and self.quarantine.most:
            self.quarantine.add(row, str(error))
            return
        shard = self.split.shards[self.split.shard[row]]
        raise ValueError(
            f"{self.split.keys[row]} in {shard} does not decode: {error}; "
            f"run 'fader verify {shard.parent}' to see what else is damaged, then 'fader prepare' again"
        ) from error
