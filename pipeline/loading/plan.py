"""The plan: which records make batch k of a stream.

A plan is a pure function of (seed, salt, stream, draw, size), so nothing about a loader has to be restored: a resumed
run asks for draw k and gets what the unbroken run got, on any number of ranks. Ranks cut the global batch afterwards.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from torch import Tensor

from fader.draws import key_of
from pipeline.config import AugmentConfig

Rows = TypeVar("Rows", np.ndarray, Tensor)
Words = Callable[[int], np.ndarray]  # so many random uint64

_EPOCHS_KEPT = 8  # a few streams at a time, two epochs each when a batch spans their border


@dataclass(frozen=True, eq=False)
class Request:
    """One global batch to be made: draw `draw` of a stream, which key its random numbers. rows: [B] int64 rows of the
    split, of all ranks. images: False for a phase that reads labels only. flip: mirror each with probability one half."""

    stream: str
    draw: int
    rows: np.ndarray
    images: bool = True
    flip: bool = False
    augment: AugmentConfig | None = None


class Plan:
    """Which rows of a split make draw k of a stream.

    A stream is an endless line of epochs of `size` positions; draw k with batch size B takes positions k·B … (k+1)·B - 1
    of it. Without replacement each epoch is a permutation, so every record is read exactly once an epoch whatever B is;
    with replacement each position is an independent row.

    With weights a record of weight w (their mean counts as 1) stands ⌊w⌋ or ⌈w⌉ times in an epoch, w times on average, by
    systematic sampling (Madow and Madow 1944, "On the theory of systematic sampling"): points one apart are laid over the
    weights, put end to end group by group and shuffled inside each, so a group's share of an epoch is exact to one
    record. With replacement each position is record i with probability w_i / size.

    Numbers come from Philox raw words (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose stream
    numpy promises to keep over its versions; `Generator.permutation` carries no such promise.

    seed, salt: other values give other, independent orders. window: shards, permuted, that are taken together, and records
    are permuted inside each window; None: a full shuffle. shard_of: [size] the shard of each row; needed with a window.
    weights: [size] of the records, none below 0. groups: [size] integers, equal for records whose share is exact together.
    """

    def __init__(
        self, size: int, seed: int, salt: int = 0, window: int | None = None, shard_of: np.ndarray | None = None,
        replacement: bool = False, weights: np.ndarray | None = None, groups: np.ndarray | None = None,
    ) -> None:
        assert size > 0
        self.size, self.seed, self.salt, self.replacement = int(size), seed, salt, replacement
        self._shards: list[np.ndarray] = []
        self._window = 0
        if window is not None:
            if replacement:
                raise ValueError("a window orders a pass over the shards; sampling with replacement has none: drop one")
            assert window > 0 and shard_of is not None and len(shard_of) == size
            _, counts = np.unique(shard_of, return_counts=True)
            if window < len(counts):
                order = np.argsort(shard_of, kind="stable")
                self._shards = np.split(order, np.cumsum(counts)[:-1])
                self._window = window
        if weights is not None:
            assert weights.shape == (size,) and (groups is None or groups.shape == (size,))
            assert np.isfinite(weights).all() and (weights >= 0).all() and (weights > 0).any()
        self._weights, self._groups = weights, groups
        kind = np.int32 if self.size < 2**31 else np.int64
        self._epoch = lru_cache(_EPOCHS_KEPT)(lambda stream, epoch: self._order(stream, epoch).astype(kind))

    def rows(self, stream: str, draw: int, batch_size: int) -> np.ndarray:
        """[batch_size] int64: the global batch of this draw, in order."""
        assert batch_size > 0 and draw >= 0
        start, stop = draw * batch_size, (draw + 1) * batch_size
        out = np.empty(batch_size, np.int64)
        for epoch in range(start // self.size, (stop - 1) // self.size + 1):
            first = epoch * self.size
            low, high = max(start, first), min(stop, first + self.size)
            out[low - start : high - start] = self._epoch(stream, epoch)[low - first : high - first]
        return out

    def _order(self, stream: str, epoch: int) -> np.ndarray:
        """[size] int64: the rows at positions epoch·size … (epoch+1)·size - 1 of the stream."""
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


def _words(seed: int, salt: int, stream: str, epoch: int) -> Words:
    key = key_of("plan", seed, salt, stream, epoch) & 0xFFFFFFFFFFFFFFFF
    return np.random.Philox(np.random.SeedSequence(key)).random_raw


def _at(ends: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The stretch of a line on which each point lies. `ends` are where the stretches end; one of length 0 holds no point."""
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
    Raises ValueError: rank is not one of world_size."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}; ranks run from 0 to world_size - 1")
    return rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size]


def sequential(size: int, batch_size: int, stream: str = "eval") -> Iterator[Request]:
    """Each row once, in order, never flipped; the last batch holds what is left."""
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be at least 1")
    for draw, start in enumerate(range(0, size, batch_size)):
        yield Request(stream, draw, np.arange(start, min(start + batch_size, size), dtype=np.int64))
