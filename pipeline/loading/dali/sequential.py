"""Tars read front to back by DALI's own webdataset reader, for sets too big or storage too slow for reading at random.

The plan (`batches.TarPlan`) gives each rank a stretch of the tars to read. Requests say what comes; a reader is opened
for the next few thousand records of a stream, over index files that list just those, so which record is which follows
from its place, and nothing is read that was read before a resume.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from fader.method import Batch
from pipeline.loading.dali.decoder import DaliDecoder
from pipeline.loading.dali.graph import write_index
from pipeline.loading.plan import Request, share

logger = logging.getLogger(__name__)

_RECORDS = 32_768  # that one reader reads: so many that opening it costs little beside them
_REQUESTS = 4_096  # that wait at most until it is known what a reader has to read
_RUNS = 256  # stretches of tars that one reader opens; each takes a file handle


@dataclass(frozen=True, eq=False)
class _Part:
    """A rank's share of one request: its rows, and what is read for them, which differs where some do not decode."""

    rows: np.ndarray
    read: np.ndarray


class _Reader:
    """A pipeline that reads the parts of a stream one after another."""

    def __init__(self, pipeline: Pipeline, parts: deque[_Part], num_rewritten: int) -> None:
        self.pipeline, self.parts, self.num_rewritten = pipeline, parts, num_rewritten
        pipeline.schedule_run()

    def done(self) -> None:
        """The pixels of the first part are no longer needed; another is read ahead."""
        self.parts.popleft()
        self.pipeline.release_outputs()
        self.pipeline.schedule_run()


class SequentialLoader(DaliDecoder):
    """Gives what any loader gives; it is fast only when rows are asked for in the order of the tars.

    Takes and raises what `SplitLoader` does. Each stream has a reader and decoding threads of its own.
    """

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        logger.info(
            "%s: %s records in %s tars at %d pixels, read front to back by DALI on %s (%d threads a stream, %d batches "
            "ahead), and not kept",
            self.split.name, f"{len(self.split):,}", f"{len(self.split.shards):,}", self.preprocessing.image_size,
            self.device, self.threads, self.prefetch,
        )  # fmt: skip

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """See `Loader`. Requests are read thousands ahead, pictures `prefetch` batches of each stream."""
        with contextlib.closing(self.ahead(requests)) as ahead:
            yield from self._read(iter(ahead))

    def _read(self, requests: Iterator[Request]) -> Iterator[Batch]:
        waiting: deque[Request] = deque()
        readers: dict[str, _Reader] = {}
        try:
            while (request := waiting.popleft() if waiting else next(requests, None)) is not None:
                if not request.images or not len(self._share(request)):
                    yield self.finish(request, self.rows(request), self._empty(request))
                    continue
                pixels = None
                while pixels is None:
                    if request.stream not in readers:
                        readers[request.stream] = self._open(self._coming(request, waiting, requests))
                    pixels = self._next(readers[request.stream])
                    if pixels is None:
                        del readers[request.stream]
                batch = self.finish(request, self.rows(request), pixels)
                del pixels  # before the reader that owns their memory
                readers[request.stream].done()
                if not readers[request.stream].parts:
                    del readers[request.stream]
                yield batch
        finally:
            readers.clear()  # ends DALI's threads

    def _share(self, request: Request) -> np.ndarray:
        return share(request.rows, self.rank, self.world_size)

    def _coming(self, request: Request, waiting: deque[Request], requests: Iterator[Request]) -> deque[_Part]:
        """What the next reader of the request's stream reads: its share, and those that follow and are as large.

        Requests that had to be looked at for that are added to `waiting`.
        """
        tar = -(-len(self.split) // len(self.split.shards))
        most = _RECORDS if self.split.remote is None else tar  # what lies elsewhere must be here before it is opened
        parts: deque[_Part] = deque()
        records = runs = 0

        def further() -> Iterator[Request]:
            yield request
            yield from list(waiting)
            while len(waiting) < _REQUESTS and (more := next(requests, None)) is not None:
                waiting.append(more)
                yield more

        for other in further():
            if other.stream != request.stream or not other.images:
                continue
            rows = self._share(other)
            read = self.readable(rows)
            runs += 1 + np.count_nonzero(self._breaks(read))
            if parts and (len(rows) != len(parts[0].rows) or records + len(rows) > most or runs > _RUNS):
                break
            parts.append(_Part(rows, read))
            records += len(rows)
        return parts

    def _open(self, parts: deque[_Part]) -> _Reader:
        """A reader of these parts, all of one size."""
        geometries = iter([part.read for part in parts])
        rows = np.concatenate([part.read for part in parts])
        runs = np.split(rows, np.flatnonzero(self._breaks(rows)) + 1)
        paths = [self.rewritten.get(int(run[0])) or self._path(int(self.split.shard[run[0]])) for run in runs]
        with tempfile.TemporaryDirectory(prefix="fader-") as folder:
            indices = [self._write_index(Path(folder, f"{n}.idx"), run) for n, run in enumerate(runs)]

            def read():
                return fn.readers.webdataset(
                    paths=[str(path) for path in paths],
                    index_paths=indices,
                    ext=["picture"],
                    missing_component_behavior="error",
                    dont_use_mmap=True,  # maps are slow on network file systems and end the process on I/O errors
                    prefetch_queue_depth=self.prefetch,
                )

            pipeline = self.build(lambda: self.geometry.of(next(geometries)), len(parts[0].rows), read)
        return _Reader(pipeline, parts, len(self.rewritten))

    def _breaks(self, rows: np.ndarray) -> np.ndarray:
        """Where the next row stands in another file: [rows - 1] bool."""
        alone = np.isin(rows, list(self.rewritten))
        return (np.diff(self.split.shard[rows]) != 0) | alone[1:] | alone[:-1]

    def stored(self, row: int) -> np.ndarray:
        """The bytes in the tar, which is what DALI's reader gives to its decoder."""
        return self.split.bytes(row)

    def _path(self, shard: int) -> Path:
        """The file of a tar. An OSError says in fewer words than DALI that it cannot be opened."""
        path = self.split.shards[shard]
        path = path if self.split.remote is None else self.split.remote.fetch(path.name)
        with open(path, "rb"):
            return path

    def _next(self, reader: _Reader) -> Tensor | None:
        """Pixels of the reader's first part; None when it met a record that does not decode. That record is left out now, and
        a new reader is needed, because this one gives nothing any more.

        Raises:
            ValueError: there is no quarantine, or too much in it.
        """
        pixels = self.outputs(reader.pipeline, len(reader.parts[0].rows))
        if not isinstance(pixels, str):
            return pixels
        in_hand = list(islice(reader.parts, 2 * self.prefetch + 1))
        known = all(np.array_equal(part.read, self.readable(part.rows)) for part in in_hand)
        if known and reader.num_rewritten == len(self.rewritten):
            self.replace_refused(in_hand, pixels)  # else another stream has met it meanwhile
        return None

    def _write_index(self, path: Path, rows: np.ndarray) -> str:
        """Where these rows of one file lie in it, as DALI reads it."""
        alone = self.rewritten.get(int(rows[0]))
        if alone is None:
            return write_index(path, self.split, rows)
        path.write_text(f"v1.1 1\npicture 0 {alone.stat().st_size}\n")
        return str(path)
