"""The loader that decodes through DALI, streamed or kept in memory, and the choice of the loader that a config asks for.

The memory fills while training already runs. Flip and normalisation are the shared `loader.finish`, so a kept batch
equals a streamed one to the bit.
"""

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from torch import Tensor

from fader.attributes import Attributes
from fader.method import Batch
from pipeline.data.shards import Split
from pipeline.images import Preprocessing
from pipeline.loading.cache import Cache, Kept, OnNode, alone, choose, open_kept
from pipeline.loading.dali.decoder import DaliDecoder
from pipeline.loading.loader import Loader
from pipeline.loading.pillow import PillowLoader
from pipeline.loading.plan import Request, share

logger = logging.getLogger(__name__)


class DaliLoader(DaliDecoder):
    """Takes and raises what `SplitLoader` does; on a CUDA device DALI decodes there ("mixed"). cache: keep every record
    that was decoded, as uint8, for all streams of a run; with "host" for the machine's other ranks, too."""

    def __init__(
        self, split: Split, attributes: Attributes, preprocessing: Preprocessing, *, cache: Cache = "auto",
        on_node: OnNode = alone, **options,
    ) -> None:
        super().__init__(split, attributes, preprocessing, **options)
        num_bytes = len(split) * math.prod(self.shape)
        self.cache, why = choose(cache, num_bytes, self.device, on_node)
        keeps = self.cache != "none"
        self._kept = open_kept(self.cache, len(split), self.shape, self.device, on_node) if keeps else None
        self._began = time.monotonic()
        self._filled = False
        place = self.device if self.cache == "device" else "this machine"
        logger.info(
            "%s: %s records at %d pixels, decoded by DALI on %s (%d threads, %d batches ahead), %s (data.cache %s: %s)",
            split.name, f"{len(split):,}", preprocessing.image_size, self.device, self.threads, self.prefetch,
            f"once, and kept in the memory of {place}" if keeps else "and not kept", cache, why,
        )

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """See `Loader`. DALI decodes `prefetch` batches ahead; what is kept is gathered when asked for."""
        if self._kept is None:
            with contextlib.closing(self.ahead(requests)) as requests:
                yield from self.decoded(
                    requests,
                    lambda request, pixels: self.finish(request, self.rows(request), pixels),
                    lambda rows: share(rows, self.rank, self.world_size),
                )
        else:
            with contextlib.closing(self.ahead(requests, self._kept.absent)) as requests:
                yield from self._keeping(requests, self._kept)

    def _keeping(self, requests: Iterable[Request], kept: Kept) -> Iterator[Batch]:
        """Decode only what is not kept yet, and a record that several requests want only once. Batches are finished in the
        order of requests, so what an earlier one decodes is there when a later one is finished."""
        coming = np.zeros(len(self.split), bool)
        decoding: deque[np.ndarray] = deque()

        def part(rows: np.ndarray) -> np.ndarray:
            missing = kept.missing(self.readable(share(rows, self.rank, self.world_size)), coming)
            coming[missing] = True
            decoding.append(missing)
            return missing

        def consume(request: Request, pixels: Tensor | None) -> Batch:
            if pixels is not None:
                mine = self.readable(share(request.rows, self.rank, self.world_size))
                missing = self.readable(decoding.popleft())
                if len(missing):
                    kept.put(missing, pixels)
                    self._tell_when_filled(kept)
                if len(missing) < len(mine):
                    pixels = kept.take(mine)
            return self.finish(request, self.rows(request), pixels)

        yield from self.decoded(requests, consume, part)

    def _tell_when_filled(self, kept: Kept) -> None:
        if not self._filled and kept.count == len(self.split):
            self._filled = True
            seconds, size = time.monotonic() - self._began, len(self.split)
            logger.info("%s: all %s records are kept now, after %.1f s", self.split.name, f"{size:,}", seconds)


def open_loader(
    kind: Literal["dali", "pillow"], cache: Cache, split: Split, attributes: Attributes, preprocessing: Preprocessing, *,
    on_node: OnNode = alone, **options,
) -> Loader:
    """The loader a config asks for; `options` are `SplitLoader`'s. Raises ValueError: an unknown kind, a cache for a
    loader that keeps nothing, and what the loaders raise."""
    if kind == "dali":
        return DaliLoader(split, attributes, preprocessing, cache=cache, on_node=on_node, **options)
    if kind != "pillow":
        raise ValueError(f"unknown loader {kind!r}; there are: dali, pillow")
    if cache not in ("auto", "none"):
        raise ValueError(f"data.cache is {cache!r}, and the loader pillow keeps nothing: set it to none, or use dali")
    return PillowLoader(split, attributes, preprocessing, **options)
