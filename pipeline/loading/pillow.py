"""Pillow on the CPU: the reference for other decoders, and the fallback. The stock webdataset stream."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
import webdataset
from PIL import Image

from fader.attributes import Attributes
from fader.method import Batch
from pipeline.data.shards import Split
from pipeline.images import Preprocessing, preprocess
from pipeline.loading.loader import SplitLoader
from pipeline.loading.plan import Request, share

logger = logging.getLogger(__name__)


class PillowLoader(SplitLoader):
    """Decodes each record with Pillow, in threads: Pillow lets the interpreter's lock go while it decodes and resizes.

    Takes and raises what `SplitLoader` does.
    """

    def __init__(self, split: Split, attributes: Attributes, preprocessing: Preprocessing, **options) -> None:
        super().__init__(split, attributes, preprocessing, **options)
        logger.info(
            "%s: %s records at %d pixels, decoded by Pillow for each batch (%d threads), used on %s",
            split.name, f"{len(split):,}", preprocessing.image_size, self.threads, self.device,
        )

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="pillow")
        waiting: deque[tuple[Request, list[Future[np.ndarray]]]] = deque()
        requests = self.ahead(requests)
        try:
            for request in requests:
                mine = share(request.rows, self.rank, self.world_size) if request.images else ()
                waiting.append((request, [pool.submit(self._pixels, int(row)) for row in mine]))
                if len(waiting) > self.prefetch:
                    yield self._batch(*waiting.popleft())
            while waiting:
                yield self._batch(*waiting.popleft())
        finally:
            requests.close()
            pool.shutdown(cancel_futures=True)

    def _pixels(self, row: int) -> np.ndarray:
        """Pixels of one record, or of the one that is read in its place: uint8 [S, S, C]."""
        while True:
            row = int(self.readable(np.array([row]))[0])
            try:
                return preprocess(self.split.picture(row), self.preprocessing)
            except ValueError as error:
                self.leave_out(row, error)

    def _batch(self, request: Request, parts: list[Future[np.ndarray]]) -> Batch:
        if not request.images:
            return self.finish(request, self.rows(request), None)
        size, channels = self.preprocessing.image_size, self.preprocessing.channels
        pixels = np.empty((len(parts), size, size, channels), np.uint8)
        for n, part in enumerate(parts):
            pixels[n] = part.result()
        return self.finish(request, self.rows(request), torch.from_numpy(pixels).to(self.device))


def stock_stream(
    split: Split, attributes: Attributes, preprocessing: Preprocessing, *, window: int = 0, seed: int = 0
) -> webdataset.WebDataset:
    """The split's tars through webdataset's own readers, with nothing of ours but the crop and resize: (key, uint8 [S, S,
    C], float32 [A] labels) of each record, front to back, once. window: records of its shuffle buffer; 0 keeps the order."""
    stream = webdataset.WebDataset([str(shard) for shard in split.shards], shardshuffle=False, empty_check=False)
    stream = stream.shuffle(window, seed=seed) if window else stream
    return stream.decode("pilrgb").map(partial(_stock_sample, attributes, preprocessing))


def _stock_sample(attributes: Attributes, preprocessing: Preprocessing, sample: dict) -> tuple:
    labels = np.array([sample["json"][name] for name in attributes.names], np.float32)
    (image,) = (value for value in sample.values() if isinstance(value, Image.Image))
    return sample["__key__"], preprocess(image, preprocessing), labels
