"""Decoding through DALI: on the CPU, or on the GPU where there is one.

The plan says which records a batch has and the manifest where their bytes lie; DALI gets views of the mapped tars, so
reading them from disk, decoding, cropping and resizing all happen in its threads, off the interpreter's lock.
"""

import logging
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from pipeline.images import decode, png_bytes
from pipeline.loading.dali.graph import Geometry, build
from pipeline.loading.loader import SplitLoader
from pipeline.loading.plan import Request

Result = TypeVar("Result")

_LOOK_AHEAD = 16  # requests without images that may stand between two with images before decoding ahead pauses

_Inputs = tuple[list[np.ndarray] | np.ndarray, ...]
"""What DALI reads for a batch: encoded bytes, and where to cut them; see `Geometry`."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Job:
    """A request, and the rows of it that this process decodes. inputs: what DALI reads for them, which are the bytes of those
    rows or of others in their place; None where there is nothing to decode."""

    request: Request
    rows: np.ndarray
    inputs: _Inputs | None


class _Feed:
    """Hands jobs to DALI in their order, and keeps those whose results nobody has read yet.

    DALI asks `source` for its inputs whenever its queue has room. When there is nothing to hand out now, StopIteration
    tells it to finish what it has, and after `reset` it asks again: at the end; at a batch larger than the pipeline was
    built for; and where many requests in a row have no images, because those would otherwise be read ahead without end.
    """

    def __init__(self, jobs: Iterator[_Job]) -> None:
        self.waiting: deque[_Job] = deque()  # handed out, or passed on the way to those that were
        self.held: _Job | None = None  # to be handed out next
        self.largest = 0  # records of a batch that the pipeline takes
        self._jobs = jobs
        self._again: deque[_Job] = deque()

    def take(self) -> _Job | None:
        """The next job; None after the last."""
        job, self.held = self.held, None
        if job is None and self._again:
            job = self._again.popleft()
        return next(self._jobs, None) if job is None else job

    def source(self) -> _Inputs:
        for _ in range(_LOOK_AHEAD):
            job = self.take()
            if job is None:
                break
            if len(job.rows) > self.largest:
                self.held = job
                break
            self.waiting.append(job)
            if job.inputs is not None:
                return job.inputs
        raise StopIteration

    def begin_again(self, renew: Callable[[_Job], _Job]) -> None:
        """Hand out again, renewed, the jobs that wait; the pipeline that reads them must be gone."""
        self._again.extend(renew(job) for job in self.waiting)
        self._again.extend([self.held] if self.held else [])
        self.held, self.largest = None, 0
        self.waiting.clear()


class DaliDecoder(SplitLoader):
    """Turns requests into pixels on the device. Takes and raises what `SplitLoader` does. A picture that Pillow decodes
    and DALI refuses is given to DALI as a PNG of what Pillow decoded, so both read the same pictures."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.shape = (self.preprocessing.image_size, self.preprocessing.image_size, self.preprocessing.channels)
        self.geometry = Geometry(self.split, self.preprocessing, self.boxes)
        self.rewritten: dict[int, Path] = {}
        self._copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="fader-")

    def decoded(
        self, requests: Iterable[Request], consume: Callable[[Request, Tensor | None], Result],
        part: Callable[[np.ndarray], np.ndarray],
    ) -> Iterator[Result]:
        """`consume(request, pixels [N, S, S, C] on the device)` of each request, in order, decoding ahead the rows of
        `part`.

        A record that DALI refuses ends its pipeline. It is rewritten or goes into quarantine, and a new pipeline does again
        what the old one had in its hands; `consume` then gets the pixels of what replaces it.
        """
        feed = _Feed(self._job(request, part(request.rows) if request.images else request.rows[:0]) for request in requests)
        pipeline: Pipeline | None = None
        try:
            while (job := feed.take()) is not None:
                if job.inputs is None:
                    yield consume(job.request, self._empty(job.request))
                    continue
                if pipeline is None or len(job.rows) > feed.largest:
                    pipeline, feed.largest = None, len(job.rows)
                    pipeline = self._build(feed.source, feed.largest)
                pipeline.reset()
                feed.held = job
                pipeline.schedule_run()
                while feed.waiting:
                    job = feed.waiting[0]
                    if job.inputs is None:
                        result = consume(job.request, self._empty(job.request))
                        feed.waiting.popleft()
                    else:
                        pixels = self.outputs(pipeline, len(job.rows))
                        if isinstance(pixels, str):
                            self.replace_refused(feed.waiting, pixels)
                            pipeline = None
                            feed.begin_again(lambda job: self._job(job.request, job.rows))
                            break
                        result = consume(job.request, pixels)
                        pipeline.release_outputs()
                        feed.waiting.popleft()
                        pipeline.schedule_run()
                    yield result
        finally:
            pipeline = None  # ends DALI's threads; the feed keeps alive what they read, and the pipeline keeps the feed

    def _job(self, request: Request, rows: np.ndarray) -> _Job:
        return _Job(request, rows, self._inputs(self.readable(rows)) if len(rows) else None)

    def _inputs(self, rows: np.ndarray) -> _Inputs:
        return [self._encoded(row) for row in rows.tolist()], *self.geometry.of(rows)

    def _encoded(self, row: int) -> np.ndarray:
        path = self.rewritten.get(row)
        return _without_exif_of_webp(self.split.bytes(row)) if path is None else np.fromfile(path, np.uint8)

    def _empty(self, request: Request) -> Tensor | None:
        """Pixels of a request that needs no decoding: none, or those of a share without records."""
        if not request.images:
            return None
        return torch.empty((0, *self.shape), dtype=torch.uint8, device=self.device)

    def _build(self, source: Callable, batch_size: int) -> Pipeline:
        return build(self.geometry, source, batch_size, self.threads, self.prefetch, self.device)

    def outputs(self, pipeline: Pipeline, count: int) -> Tensor | str:
        """The next pixels [count, S, S, C], on the device; on the CPU they are valid until `release_outputs`. When a record
        of a batch on its way does not decode: what DALI said; an exception would keep alive frames, and so the pipeline.

        On CUDA they are copied on a stream of its own, which is waited for, so DALI may reuse its buffer.
        """
        try:
            (pixels,) = pipeline.share_outputs()
        except RuntimeError as error:
            return str(error)
        if self.device.type == "cpu":
            return torch.from_dlpack(pixels.as_tensor())
        assert self._copying is not None
        with torch.cuda.stream(self._copying):
            copy = torch.empty((count, *self.shape), dtype=torch.uint8, device=self.device)
            feed_ndarray(pixels.as_tensor(), copy, cuda_stream=self._copying)
        self._copying.synchronize()
        copy.record_stream(torch.cuda.current_stream(self.device))
        return copy

    def replace_refused(self, jobs: Iterable[_Job], error: str) -> None:
        """Rewrite or quarantine what DALI refuses in the first batch that has such a record: DALI names none itself. Raises
        ValueError: there is no quarantine, or too much in it; RuntimeError: DALI takes every record when it is asked again."""
        for job in jobs:
            refused = self._refused(np.unique(self.readable(job.rows)))
            for row, words in refused:
                fault = self._rewrite(row, words)
                if fault:
                    self.leave_out(row, fault)
            if refused:
                return
        raise RuntimeError(f"DALI failed on a batch of which it decodes every record alone: {_message(error)}")

    def _refused(self, rows: np.ndarray) -> list[tuple[int, str]]:
        """The rows that DALI refuses, whatever stands beside them, each with its words. They are searched by halving."""
        words = self._refusal(rows) if len(rows) else None
        if words is None:
            return []
        if len(rows) == 1:
            return [(int(rows[0]), words)]
        middle = len(rows) // 2
        return self._refused(rows[:middle]) + self._refused(rows[middle:])

    def _refusal(self, rows: np.ndarray) -> str | None:
        """What DALI says of these rows in a pipeline of their own; None when it decodes them."""
        inputs = self._inputs(rows)
        once = iter([inputs])
        pipeline = self._build(lambda: next(once), len(rows))
        pipeline.schedule_run()
        pixels = self.outputs(pipeline, len(rows))
        del pipeline  # before what it reads
        return pixels if isinstance(pixels, str) else None

    def _rewrite(self, row: int, words: str) -> Exception | None:
        """Have DALI read a refused picture from another file; where Pillow refuses it, too, return what is wrong with it."""
        try:
            size = self.split.picture(row).size
            pixels = np.asarray(decode(self.split.bytes(row), None if self.split.orientation is None else 1))
        except ValueError as fault:
            return fault
        expected = (int(self.split.width[row]), int(self.split.height[row]))
        if size != expected:
            return ValueError(f"it is {size}, its manifest says {expected} pixels")
        if row in self.rewritten:
            return ValueError(f"Pillow reads it and DALI does not: {_message(words)}")
        path = Path(self._folder.name, f"{row}.png")
        path.write_bytes(png_bytes(pixels))
        self.rewritten[row] = path
        logger.warning(
            "%s: DALI does not read %s (%s); Pillow does, so DALI gets it as a PNG from now on",
            self.split.name, self.split.keys[row], _message(words),
        )  # fmt: skip
        return None


def _without_exif_of_webp(data: np.ndarray) -> np.ndarray:
    """The same bytes; for a WebP with Exif a copy whose header says that it has none, because none is needed here.

    nvImageCodec 0.9 loses its way to an Exif that stands behind a chunk of odd length, and refuses the picture.
    """
    if data[:1].tobytes() != b"R" or len(data) < 21 or data[12:16].tobytes() != b"VP8X" or not data[20] & 8:
        return data
    copy = data.copy()
    copy[20] &= ~np.uint8(8)
    return copy


def _message(words: str) -> str:
    """DALI's words without the internals of its pipeline around them."""
    said = words.rpartition("encountered:")[2].partition("C++ context")[0].partition("Current pipeline object")[0]
    return " ".join(re.sub(r"\[/[^\]]*\]", "", said).split())[:200] or "it says no reason"
