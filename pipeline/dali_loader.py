"""The same batches through DALI: decoded on the CPU, or on the GPU where there is one; streamed, or kept in memory.

The plan says which records a batch has and the manifest where their bytes lie; DALI gets views of the mapped tars, so
reading them from disk, decoding, cropping and resizing all happen in its threads, off the interpreter's lock. Flip and
normalisation are the shared `batches.finish`, so a kept batch equals a streamed one to the bit.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from fader.attributes import Attributes
from fader.method import Batch
from pipeline.batches import Loader, Request, SplitLoader, sequential, share
from pipeline.images import Preprocessing, decode, kernel
from pipeline.tar_loader import PillowLoader

if TYPE_CHECKING:
    from pipeline.shards import Split

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_FILL_BATCH = 128  # records decoded at once while the memory is filled
_LOOK_AHEAD = 16  # requests without images that may stand between two with images before decoding ahead pauses


_Inputs = tuple[list[np.ndarray] | np.ndarray, ...]
"""What DALI reads for a batch: see `DaliLoader._inputs`."""


@dataclass(frozen=True, eq=False)
class _Job:
    """A request, the rows of it that this process decodes, and what DALI reads while it does."""

    request: Request
    rows: np.ndarray
    inputs: _Inputs | None


class DaliLoader(SplitLoader):
    """Takes and raises what `SplitLoader` does; on a CUDA device DALI decodes there ("mixed").

    Args:
        cache: decode the whole split once, at the first batch with images, and keep it as uint8 on the device.

    Raises:
        ValueError: the memory of the device does not hold the decoded split.
    """

    def __init__(
        self,
        split: Split,
        attributes: Attributes,
        preprocessing: Preprocessing,
        *,
        cache: bool = True,
        **options,
    ) -> None:
        super().__init__(split, attributes, preprocessing, **options)
        size, channels = preprocessing.image_size, preprocessing.channels
        self.cache = cache
        self._shape = (size, size, channels)
        self._kept: Tensor | None = None
        self._copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        sides = (self.boxes[:, 2:] - self.boxes[:, :2]).max(1)
        self._resizes = any(kernel(int(side), size) != "none" for side in np.unique(sides))
        self._pads = bool((preprocessing.resized(self.boxes) != size).any())
        num_bytes = len(split) * size * size * channels
        if cache:
            available = _available_memory(self.device)
            if available is not None and num_bytes > available:
                raise ValueError(
                    f"{split.name} decoded at {size} pixels takes {num_bytes / 1e9:.1f} GB and {self.device} has "
                    f"{available / 1e9:.1f} GB free; set data.cache=false to stream it"
                )
        logger.info(
            "%s: %s records at %d pixels, decoded by DALI on %s (%d threads), %s",
            split.name, f"{len(split):,}", size, self.device, self.threads,
            f"once, and kept there: {num_bytes / 1e6:,.1f} MB" if cache else f"{self.prefetch} batches ahead",
        )

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """See `Loader`. Streamed, DALI decodes `prefetch` batches ahead; kept, batches are gathered when asked for."""
        if not self.cache:
            yield from self._decoded(
                requests,
                lambda request, pixels: self.finish(request, self.rows(request), pixels),
                lambda rows: share(rows, self.rank, self.world_size),
            )
            return
        for request in requests:
            rows = self.rows(request)
            pixels = self._gathered(share(rows, self.rank, self.world_size)) if request.images else None
            yield self.finish(request, rows, pixels)

    def _gathered(self, index: Tensor) -> Tensor:
        """uint8 [N, S, S, C] of these rows, out of memory; on the CPU without torch's threads (see `normalised`)."""
        kept = self._pixels()
        if self.device.type == "cpu":
            return torch.from_numpy(kept.numpy().take(index.numpy(), 0))
        return kept.index_select(0, index)

    def _pixels(self) -> Tensor:
        """uint8 [n, S, S, C] on the device: every record of the split, decoded at the first call."""
        if self._kept is None:
            begin = time.monotonic()
            kept = torch.empty((len(self.split), *self._shape), dtype=torch.uint8, device=self.device)

            def keep(request: Request, pixels: Tensor | None) -> None:
                assert pixels is not None
                part = kept[request.rows[0] : request.rows[-1] + 1]
                if self.device.type == "cpu":
                    part.numpy()[...] = pixels.numpy()  # torch's threads would wait for cores that DALI has
                else:
                    part.copy_(pixels)

            for _ in self._decoded(sequential(len(self.split), _FILL_BATCH), keep, lambda rows: rows):
                pass
            self._kept = kept
            seconds = time.monotonic() - begin
            logger.info(
                "%s: decoded %s records in %.1f s (%.0f images/s)",
                self.split.name, f"{len(kept):,}", seconds, len(kept) / seconds,
            )
        return self._kept

    def _decoded(
        self,
        requests: Iterable[Request],
        consume: Callable[[Request, Tensor | None], Result],
        part: Callable[[np.ndarray], np.ndarray],
    ) -> Iterator[Result]:
        """`consume(request, pixels [N, S, S, C] on the device)` of each request, in order, decoding ahead.

        DALI asks `source` for its inputs whenever its queue has room: `prefetch` times at the first `schedule_run`, and
        once at each later one. When there is nothing to hand out now, StopIteration tells DALI to finish what it has,
        and after `reset` it asks again. That happens at the end; at a batch larger than the pipeline was built for; and
        where many requests in a row have no images, because those would otherwise be read ahead without end.
        """
        requests = iter(requests)
        waiting: deque[_Job] = deque()
        held: _Job | None = None
        pipeline: Pipeline | None = None
        largest = 0

        def take() -> _Job | None:
            nonlocal held
            job, held = held, None
            if job is None and (request := next(requests, None)) is not None:
                rows = part(request.rows) if request.images else request.rows[:0]
                job = _Job(request, rows, self._inputs(rows) if len(rows) else None)
            return job

        def source() -> _Inputs:
            nonlocal held
            for _ in range(_LOOK_AHEAD):
                job = take()
                if job is not None and len(job.rows) > largest:
                    held = job
                    break
                if job is None:
                    break
                waiting.append(job)
                if job.inputs is not None:
                    return job.inputs
            raise StopIteration

        try:
            while (job := held or take()) is not None:
                if job.inputs is None:
                    held = None
                    yield consume(job.request, self._empty(job.request))
                    continue
                if len(job.rows) > largest:
                    pipeline, largest = None, len(job.rows)
                    pipeline = self._build(source, largest)
                assert pipeline is not None
                pipeline.reset()
                held = job
                pipeline.schedule_run()
                while waiting:
                    job = waiting[0]
                    if job.inputs is None:
                        result = consume(job.request, self._empty(job.request))
                        waiting.popleft()
                    else:
                        result = consume(job.request, self._outputs(pipeline, waiting))
                        pipeline.release_outputs()
                        waiting.popleft()
                        pipeline.schedule_run()
                    yield result
        finally:
            pipeline = None  # ends DALI's threads; what they read is kept alive by `waiting`, and that by `source`

    def _inputs(self, rows: np.ndarray) -> _Inputs:
        """Encoded bytes; int32 [N, 2] (top, left) and (height, width) of the crop. Where pictures are letter-boxed also
        float32 [N, 2] (height, width) to which it is resized; int32 [N, 2] (top, left) at which the square begins, seen
        from the resized crop: zero or negative."""
        box = self.boxes[rows].astype(np.int32)
        data = [self.split.bytes(row) for row in rows.tolist()]
        start = np.ascontiguousarray(box[:, [1, 0]])
        inputs = (data, start, np.ascontiguousarray(box[:, [3, 2]] - start))
        if not self._pads:
            return inputs
        sizes = self.preprocessing.resized(box)[:, ::-1]
        corner = np.ascontiguousarray(-self.preprocessing.margins(sizes), np.int32)
        return *inputs, np.ascontiguousarray(sizes, np.float32), corner

    def _empty(self, request: Request) -> Tensor | None:
        """Pixels of a request that needs no decoding: none, or those of a share without records."""
        if not request.images:
            return None
        return torch.empty((0, *self._shape), dtype=torch.uint8, device=self.device)

    def _build(self, source: Callable, batch_size: int) -> Pipeline:
        on_gpu = self.device.type == "cuda"
        size, channels = self.preprocessing.image_size, self.preprocessing.channels

        @pipeline_def(
            batch_size=batch_size,
            num_threads=self.threads,
            device_id=_index(self.device) if on_gpu else None,
            prefetch_queue_depth=self.prefetch,
        )
        def decoding():
            kinds = [types.UINT8, types.INT32, types.INT32, types.FLOAT, types.INT32][: 5 if self._pads else 3]
            data, start, shape, *letterbox = fn.external_source(
                source=source,
                num_outputs=len(kinds),
                batch=True,
                no_copy=True,
                dtype=kinds,
                ndim=[1] * len(kinds),
            )
            if on_gpu:
                images = fn.decoders.image(data, device="mixed", affine=False, jpeg_fancy_upsampling=True)
                images = fn.slice(images, start=start, shape=shape, axes=[0, 1])
            else:  # reads only the rows it needs: a quarter less work on CelebA, the same pixels
                images = fn.decoders.image_slice(
                    data, start=start, shape=shape, axes=[0, 1], jpeg_fancy_upsampling=True
                )
            if self._resizes:  # a square that has the size already comes out of the kernels unchanged
                images = fn.resize(
                    images,
                    size=letterbox[0] if self._pads else (size, size),
                    mag_filter=types.INTERP_LANCZOS3,
                    min_filter=types.INTERP_LINEAR,
                    antialias=True,
                )
            if self._pads:
                images = fn.slice(
                    images, letterbox[1], [size, size], axes=[0, 1], out_of_bounds_policy="pad", fill_values=0
                )
            if channels == 1:
                images = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
            return images

        pipeline = decoding()
        pipeline.build()
        return pipeline

    def _outputs(self, pipeline: Pipeline, waiting: deque[_Job]) -> Tensor:
        """Pixels [N, S, S, C] of the first job waiting, on the device; on the CPU valid until `release_outputs`.

        On CUDA: `share_outputs` returns when the outputs are there. They are copied on a stream of its own, which is
        waited for, so DALI may reuse its buffer; training's stream, and what it has queued, are left alone.
        """
        try:
            (pixels,) = pipeline.share_outputs()
        except RuntimeError as error:
            raise self._explain(waiting, error) from error
        if self.device.type == "cpu":
            return torch.from_dlpack(pixels.as_tensor())
        assert self._copying is not None
        with torch.cuda.stream(self._copying):
            copy = torch.empty((len(waiting[0].rows), *self._shape), dtype=torch.uint8, device=self.device)
            feed_ndarray(pixels.as_tensor(), copy, cuda_stream=self._copying)
        self._copying.synchronize()
        copy.record_stream(torch.cuda.current_stream(self.device))
        return copy

    def _explain(self, waiting: deque[_Job], error: RuntimeError) -> Exception:
        """DALI names no sample: Pillow finds the first record in its hands that cannot be read."""
        for row in (row for job in waiting for row in job.rows.tolist()):
            try:
                found = decode(self.split.bytes(row)).size
            except ValueError as reason:
                return self.unreadable(row, reason)
            expected = (int(self.split.width[row]), int(self.split.height[row]))
            if found != expected:
                return self.unreadable(row, ValueError(f"it is {found}, its manifest says {expected} pixels"))
        return RuntimeError(f"DALI failed on a batch whose every record Pillow decodes: {error}")


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _available_memory(device: torch.device) -> int | None:
    """Bytes free on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def open_loader(
    kind: Literal["dali", "pillow"],
    cache: bool,
    split: Split,
    attributes: Attributes,
    preprocessing: Preprocessing,
    **options,
) -> Loader:
    """The loader a config asks for; `options` are `SplitLoader`'s.

    Raises:
        ValueError: an unknown kind, and what the loaders raise.
    """
    if kind == "dali":
        return DaliLoader(split, attributes, preprocessing, cache=cache, **options)
    if kind == "pillow":
        return PillowLoader(split, attributes, preprocessing, **options)
    raise ValueError(f"unknown loader {kind!r}; there are: dali, pillow")
