"""The Loader protocol, what the loaders of one split share, and how pixels become a Batch after every decoder."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fader.attributes import Attributes
from fader.draws import Draws
from fader.method import Batch
from pipeline.data.remote import Ahead
from pipeline.data.shards import Split
from pipeline.data.shards.manifest import untaught
from pipeline.images import Preprocessing, flip, to_float
from pipeline.loading.augmentation import augmented
from pipeline.loading.plan import Request, share
from pipeline.loading.quarantine import Quarantine

logger = logging.getLogger(__name__)


class Loader(Protocol):
    """Makes the batches that a plan asks for. seed: keys their draws; it may be set anew before each call of `batches`."""

    seed: int

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """This rank's share of each request, in order. A loader may read several requests ahead; closing the iterator ends
        all work and all threads begun for it. Raises ValueError: a record does not decode."""
        ...


class SplitLoader:
    """What the loaders of one split share: labels on the device, this rank's rows, naming a bad record.

    attributes: the columns of `Batch.attributes`, in order. seed: of the run, with its salt; keys the draws. rank,
    world_size: which share of each global batch to make. device: where batches stand. threads: that decode. prefetch:
    batches made ahead. quarantine: where records go that do not decode, for others to stand in; None: they are an error.
    """

    def __init__(
        self, split: Split, attributes: Attributes, preprocessing: Preprocessing, *, seed: int, rank: int = 0,
        world_size: int = 1, device: torch.device = torch.device("cpu"), threads: int = 2, prefetch: int = 3,
        quarantine: Quarantine | None = None,
    ) -> None:
        if threads < 1 or prefetch < 1:
            raise ValueError(f"{threads} threads and {prefetch} batches ahead; a loader needs at least 1 of each")
        share(split.shard, rank, world_size)
        self.split, self.attributes, self.preprocessing = split, attributes, preprocessing
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.device, self.threads, self.prefetch = torch.device(device), threads, prefetch
        self.quarantine = quarantine
        self.boxes = preprocessing.boxes(split.width, split.height)
        labels = np.ascontiguousarray(split.columns(attributes))
        for words in untaught(attributes.to_list(), labels) if split.name == "train" else ():
            logger.warning("train: %s: nothing can be learnt of it", words)
        self.labels = torch.from_numpy(labels).to(self.device)

    def readable(self, rows: np.ndarray) -> np.ndarray:
        """The rows, those that are known not to decode replaced by others."""
        return rows if self.quarantine is None else self.quarantine.readable(rows)

    def rows(self, request: Request) -> Tensor:
        """The request's rows [B], copied to the device without waiting for it. Where pictures are read, records that do not
        decode are replaced, so call it when this rank's pictures are there."""
        rows = torch.from_numpy(self.readable(request.rows) if request.images else request.rows)
        return rows if self.device.type == "cpu" else rows.pin_memory().to(self.device, non_blocking=True)

    def finish(self, request: Request, rows: Tensor, pixels: Tensor | None) -> Batch:
        """See `finish`; rows [B] and pixels [N, S, S, C] are on the device."""
        return finish(request, pixels, self.labels, rows, seed=self.seed, rank=self.rank, world_size=self.world_size)

    def ahead(
        self, requests: Iterable[Request], needed: Callable[[np.ndarray], np.ndarray] = lambda rows: rows
    ) -> Iterator[Request]:
        """Give the same requests. Of a set that lies elsewhere, the tars of later requests are fetched meanwhile, as far
        ahead as two tars have records. needed: those of some rows whose bytes will be read."""
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
        """Put a record that does not decode into quarantine. Raises ValueError: there is none, or there are too many in it."""
        if self.quarantine is not None and self.quarantine.most:
            self.quarantine.add(row, str(error))
            return
        shard = self.split.shards[self.split.shard[row]]
        raise ValueError(
            f"{self.split.keys[row]} in {shard} does not decode: {error}; "
            f"run 'fader verify {shard.parent}' to see what else is damaged, then 'fader prepare' again"
        ) from error


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
    calling thread does it alone, because torch's threads spin while they wait for a decoder's core."""
    if pixels.device.type != "cpu":
        return to_float(flip(pixels.permute(0, 3, 1, 2), mirrored))
    images = np.empty(pixels.shape, np.float32)
    for image, picture, mirror in zip(images, pixels.numpy(), mirrored.tolist()):
        image[...] = picture[:, ::-1] if mirror else picture
        image /= np.float32(127.5)
        image -= np.float32(1)
    return torch.from_numpy(images).permute(0, 3, 1, 2)
