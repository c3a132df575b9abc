"""DALI alone, with its own reader and nothing of ours but the crop and the kernel: the limit of any loader of ours."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from pipeline.data.shards import Split
from pipeline.images import Preprocessing
from pipeline.loading.dali.graph import index_of, resized


def dali_alone(
    split: Split, preprocessing: Preprocessing, folder: Path, *, batch_size: int, threads: int, prefetch: int,
    floats: bool = False, device: torch.device = torch.device("cpu"),
) -> Iterator[None]:
    """An endless iterator that gives nothing and has, each time, made uint8 squares of one more batch of the split; with
    `floats` what training reads, half of them mirrored. folder: for the index files that DALI reads beside the tars.
    Raises ValueError where pictures differ in size."""
    boxes = preprocessing.boxes(split.width, split.height)
    if (boxes != boxes[0]).any():
        raise ValueError("DALI alone is measured on pictures of one size; give the bench such a set")
    tars = [np.flatnonzero(split.shard == number) for number in range(len(split.shards))]
    indices = [_write_index(folder / f"{shard.name}.idx", split, rows) for shard, rows in zip(split.shards, tars)]
    left, top, right, bottom = boxes[0].tolist()
    on_gpu, size, channels = device.type == "cuda", preprocessing.image_size, preprocessing.channels

    @pipeline_def(
        batch_size=batch_size, num_threads=threads, device_id=index_of(device) if on_gpu else None,
        prefetch_queue_depth=prefetch,
    )
    def reading():
        data = fn.readers.webdataset(
            paths=[str(shard) for shard in split.shards], index_paths=indices, ext=["picture"],
            missing_component_behavior="error",
        )
        window = {"start": (top, left), "shape": (bottom - top, right - left), "axes": [0, 1]}
        if on_gpu:
            images = fn.slice(fn.decoders.image(data, device="mixed", affine=False, jpeg_fancy_upsampling=True), **window)
        else:
            images = fn.decoders.image_slice(data, **window, jpeg_fancy_upsampling=True)
        if (bottom - top, right - left) != (size, size):
            images = resized(images, (size, size))
        if channels == 1:
            images = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        if floats:
            scale = [127.5] * channels
            images = fn.crop_mirror_normalize(images, mirror=fn.random.coin_flip(), mean=scale, std=scale)
        return images

    pipeline = reading()
    pipeline.build()
    while True:
        pipeline.run()
        yield


def _write_index(path: Path, split: Split, rows: np.ndarray) -> str:
    """Write where the pictures of these rows of one tar lie in it, as DALI's webdataset reader reads it; return the path."""
    lines = [f"picture {split.offset[row]} {split.size[row]}" for row in rows.tolist()]
    path.write_text("\n".join([f"v1.1 {len(rows)}", *lines]) + "\n")
    return str(path)
