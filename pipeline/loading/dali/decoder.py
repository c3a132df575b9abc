"""Decoding through DALI: on the CPU, or on the GPU where there is one.

The plan says which records a batch has and the manifest where their bytes lie; DALI gets views of the mapped tars, so
reading them from disk, decoding, cropping and resizing all happen in its threads, off the interpreter's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from pipeline.images import decode, kernel
from pipeline.loading.loader import SplitLoader
from pipeline.loading.plan import Request

Result = TypeVar("Result")

_LOOK_AHEAD = 16  # requests without images that may stand between two with images before decoding ahead pauses


_Inputs = tuple[list[np.ndarray] | np.ndarray, ...]
"""What DALI reads for a batch: see `DaliDecoder._inputs`."""


@dataclass(frozen=True, eq=False)
class _Job:
    """A request, the rows of it that this process decodes, and what DALI reads while it does: the bytes of those rows,
    or of what stands in for them."""

    request: Request
    rows: np.ndarray
    inputs: _Inputs | None


class DaliDecoder(SplitLoader):
    """What turns requests into pixels on the device. Takes and raises what `SplitLoader` does."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        size, channels = self.preprocessing.image_size, self.preprocessing.channels
        self.shape = (size, size, channels)
        self._copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        sides = (self.boxes[:, 2:] - self.boxes[:, :2]).max(1)
        self._resizes = any(kernel(int(side), size) != "none" for side in np.unique(sides))
        self._pads = bool((self.preprocessing.resized(self.boxes) != size).any())

    def decoded(
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

        A record that DALI refuses ends its pipeline. It goes into quarantine, and a new pipeline does again what the old
        one had in its hands; `consume` then gets the pixels of what stands in for it.
        """
        requests = iter(requests)
        waiting: deque[_Job] = deque()
        again: deque[_Job] = deque()
        held: _Job | None = None
        pipeline: Pipeline | None = None
        largest = 0

        def take() -> _Job | None:
            nonlocal held
            job, held = held, None
            if job is None and again:
                job = again.popleft()
            if job is None and (request := next(requests, None)) is not None:
                job = self._job(request, part(request.rows) if request.images else request.rows[:0])
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
                        pixels = self._outputs(pipeline, len(job.rows))
                        if isinstance(pixels, str):
                            self._leave_out_refused(waiting, pixels)
                            again.extend(self._job(job.request, job.rows) for job in waiting)
                            again.extend([held] if held else [])
                            pipeline, held, largest = None, None, 0
                            waiting.clear()  # after the pipeline, which reads what they hold
                            break
                        result = consume(job.request, pixels)
                        pipeline.release_outputs()
                        waiting.popleft()
                        pipeline.schedule_run()
                    yield result
        finally:
            pipeline = None  # ends DALI's threads; what they read is kept alive by `waiting`, and that by `source`

    def _job(self, request: Request, rows: np.ndarray) -> _Job:
        return _Job(request, rows, self._inputs(self.standing(rows)) if len(rows) else None)

    def _inputs(self, rows: np.ndarray) -> _Inputs:
        """Encoded bytes, and `geometry`."""
        return [self.split.bytes(row) for row in rows.tolist()], *self.geometry(rows)

    def geometry(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """int32 [N, 2] (top, left) and (height, width) of the crop. Where pictures are letter-boxed also float32 [N, 2]
        (height, width) to which it is resized; int32 [N, 2] (top, left) at which the square begins, seen from the
        resized crop: zero or negative."""
        box = self.boxes[rows].astype(np.int32)
        start = np.ascontiguousarray(box[:, [1, 0]])
        crop = (start, np.ascontiguousarray(box[:, [3, 2]] - start))
        if not self._pads:
            return crop
        sizes = self.preprocessing.resized(box)[:, ::-1]
        corner = np.ascontiguousarray(-self.preprocessing.margins(sizes), np.int32)
        return *crop, np.ascontiguousarray(sizes, np.float32), corner

    def _empty(self, request: Request) -> Tensor | None:
        """Pixels of a request that needs no decoding: none, or those of a share without records."""
        if not request.images:
            return None
        return torch.empty((0, *self.shape), dtype=torch.uint8, device=self.device)

    def _build(self, source: Callable, batch_size: int, read: Callable[[], DataNode] | None = None) -> Pipeline:
        """From `source`'s inputs to pixels; with `read`, an operator that gives the encoded bytes, `source` gives the
        geometry alone."""
        on_gpu = self.device.type == "cuda"
        size, channels = self.preprocessing.image_size, self.preprocessing.channels

        @pipeline_def(
            batch_size=batch_size,
            num_threads=self.threads,
            device_id=index_of(self.device) if on_gpu else None,
            prefetch_queue_depth=self.prefetch,
        )
        def decoding():
            kinds = [types.UINT8, types.INT32, types.INT32, types.FLOAT, types.INT32][: 5 if self._pads else 3]
            kinds = kinds[1:] if read else kinds
            inputs = fn.external_source(
                source=source,
                num_outputs=len(kinds),
                batch=True,
                no_copy=read is None,
                dtype=kinds,
                ndim=[1] * len(kinds),
            )
            data, start, shape, *letterbox = (read(), *inputs) if read else inputs
            # DALI 2.4's decoders end the whole process (SIGSEGV) on a picture whose header they cannot parse, in batches of
            # some 32 and more; this operator, which comes first since they wait for what it gives, raises as it should
            shape = shape + 0 * fn.peek_image_shape(data, dtype=types.INT32)[:2]
            if on_gpu:
                images = fn.decoders.image(data, device="mixed", affine=False, jpeg_fancy_upsampling=True)
                images = fn.slice(images, start=start, shape=shape, axes=[0, 1])
            else:  # reads only the rows it needs: a quarter less work on CelebA, the same pixels
                images = fn.decoders.image_slice(
                    data, start=start, shape=shape, axes=[0, 1], jpeg_fancy_upsampling=True
                )
            if self._resizes:  # a square that has the size already comes out of the kernels unchanged
                images = resized(images, letterbox[0] if self._pads else (size, size))
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

    def _outputs(self, pipeline: Pipeline, count: int) -> Tensor | str:
        """The next pixels [count, S, S, C], on the device; on the CPU valid until `release_outputs`. Or what DALI said,
        when a record of a batch on its way does not decode: its words, because an exception would keep alive the frames
        that it went through, and with them the pipeline.

        On CUDA: `share_outputs` returns when the outputs are there. They are copied on a stream of its own, which is
        waited for, so DALI may reuse its buffer; training's stream, and what it has queued, are left alone.
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

    # --- records that DALI refuses ------------------------------------------------------------------------------------

    def _leave_out_refused(self, waiting: Iterable[_Job], error: str) -> None:
        """Quarantine what DALI refuses in the first batch that has such a record: DALI names no sample itself.

        Raises:
            ValueError: there is no quarantine, or too much in it.
            RuntimeError: DALI takes every record when it is asked again.
        """
        for job in waiting:
            refused = self._refused(np.unique(self.standing(job.rows)))
            for row, reason in refused:
                self.leave_out(row, self._reason(row, reason))
            if refused:
                return
        raise RuntimeError(f"DALI failed on a batch of which it decodes every record alone: {error}")

    def _refused(self, rows: np.ndarray) -> list[tuple[int, str]]:
        """Which of these rows DALI refuses, whatever stands beside them: found by halving."""
        reason = self._failure(rows) if len(rows) else None
        if reason is None:
            return []
        if len(rows) == 1:
            return [(int(rows[0]), reason)]
        middle = len(rows) // 2
        return self._refused(rows[:middle]) + self._refused(rows[middle:])

    def _failure(self, rows: np.ndarray) -> str | None:
        """What a pipeline of its own says to these rows; None when it decodes them."""
        inputs = self._inputs(rows)
        once = iter([inputs])
        pipeline = self._build(lambda: next(once), len(rows))
        pipeline.schedule_run()
        pixels = self._outputs(pipeline, len(rows))
        del pipeline  # before what it reads
        return pixels if isinstance(pixels, str) else None

    def _reason(self, row: int, error: str) -> Exception:
        """In Pillow's words, where it does not read the picture either; they are shorter."""
        try:
            found = decode(self.split.bytes(row)).size
        except ValueError as reason:
            return reason
        expected = (int(self.split.width[row]), int(self.split.height[row]))
        if found != expected:
            return ValueError(f"it is {found}, its manifest says {expected} pixels")
        return ValueError(f"Pillow reads it and DALI does not: {' '.join(error.split())[:300]}")


def resized(images: DataNode, size: DataNode | tuple[int, int]) -> DataNode:
    """`images.kernel` in DALI's words, for pictures that get (height, width) `size`."""
    return fn.resize(
        images, size=size, mag_filter=types.INTERP_LANCZOS3, min_filter=types.INTERP_LINEAR, antialias=True
    )


def index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
