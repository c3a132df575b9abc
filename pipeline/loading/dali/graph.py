"""DALI's pipeline from encoded bytes to uint8 squares, and the numbers that it needs for each record."""

from collections.abc import Callable

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from pipeline.data.shards import Split
from pipeline.images import Preprocessing, kernel


class Geometry:
    """What is cut out of each record of a split, and how it becomes an upright square: cut, resize, turn upright, put on
    black. So the whole picture is never turned. boxes: [n, 4] int64 (left, top, right, bottom) of the upright pictures."""

    def __init__(self, split: Split, preprocessing: Preprocessing, boxes: np.ndarray) -> None:
        self.preprocessing, self.boxes = preprocessing, boxes
        self._widths, self._heights, self._orientation = split.width, split.height, split.orientation
        sides = (boxes[:, 2:] - boxes[:, :2]).max(1)
        size = preprocessing.image_size
        self.resizes = any(kernel(int(side), size) != "none" for side in np.unique(sides))
        self.pads = bool((preprocessing.resized(boxes) != size).any())
        self.turns = self._orientation is not None and bool((self._orientation > 1).any())
        self.by_exif = self._orientation is None
        """Whether DALI turns pictures as their Exif says, because the manifest does not say how they are stored."""

    @property
    def kinds(self) -> dict[str, tuple[types.DALIDataType, int]]:
        """Names, types and dimensions of what `of` gives."""
        kinds = {"start": (types.INT32, 1), "shape": (types.INT32, 1)}
        if self.pads:
            kinds |= {"size": (types.FLOAT, 1), "corner": (types.INT32, 1)}
        if self.turns:
            kinds |= {"turn": (types.FLOAT, 2), "turned": (types.FLOAT, 1)}
        return kinds

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of these rows [N], in the order of `kinds`:

        start, shape: int32 [N, 2] (top, left) and (height, width) of the crop, of the picture as it is stored.
        size: float32 [N, 2] (height, width) to which it is resized, as it is stored.
        corner: int32 [N, 2] (top, left) at which the square begins, seen from the upright crop: zero or negative.
        turn: float32 [N, 2, 3], from (x, y) of the upright crop to (x, y) of the stored one.
        turned: float32 [N, 2] (height, width) of the upright crop.
        """
        box = self.boxes[rows]
        sizes = self.preprocessing.resized(box)
        stored, flipped, swapped = box, None, None
        if self.turns:
            assert self._orientation is not None
            orientation = self._orientation[rows]
            flipped = np.stack([np.isin(orientation, (2, 3, 6, 7)), np.isin(orientation, (3, 4, 7, 8))], 1)
            swapped = orientation >= 5
            whole = np.stack([self._widths[rows], self._heights[rows]], 1)
            low, high = np.where(flipped, whole - box[:, 2:], box[:, :2]), np.where(flipped, whole - box[:, :2], box[:, 2:])
            stored = np.concatenate([_swapped(low, swapped), _swapped(high, swapped)], 1)
        out = [stored[:, [1, 0]], stored[:, [3, 2]] - stored[:, [1, 0]]]
        if self.pads:
            stored_sizes = sizes if swapped is None else _swapped(sizes, swapped)
            out += [stored_sizes[:, ::-1], -self.preprocessing.margins(sizes)[:, ::-1]]
        if flipped is not None and swapped is not None:
            out += [_turns(sizes, flipped, swapped), sizes[:, ::-1]]
        dtypes = [np.int32 if kind == types.INT32 else np.float32 for kind, _ in self.kinds.values()]
        return tuple(np.ascontiguousarray(array, dtype) for array, dtype in zip(out, dtypes, strict=True))


def _swapped(pairs: np.ndarray, swapped: np.ndarray) -> np.ndarray:
    """[N, 2] pairs, those that are marked the other way round."""
    return np.where(swapped[:, None], pairs[:, ::-1], pairs)


def _turns(sizes: np.ndarray, flipped: np.ndarray, swapped: np.ndarray) -> np.ndarray:
    """[N, 2, 3]: flip x and y where marked, then exchange them where marked."""
    turn = np.zeros((len(sizes), 2, 3))
    turn[:, [0, 1], [0, 1]] = np.where(flipped, -1, 1)
    turn[:, :, 2] = np.where(flipped, sizes, 0)
    return np.where(swapped[:, None, None], turn[:, ::-1], turn)


def build(geometry: Geometry, source: Callable, batch_size: int, threads: int, prefetch: int, device: torch.device) -> Pipeline:
    """A pipeline to pixels [N, S, S, C]. source: gives, a batch a call, the encoded bytes and what `Geometry.of` gives."""
    on_gpu, size = device.type == "cuda", geometry.preprocessing.image_size

    @pipeline_def(
        batch_size=batch_size, num_threads=threads, device_id=index_of(device) if on_gpu else None,
        prefetch_queue_depth=prefetch,
    )
    def decoding():
        kinds = {"data": (types.UINT8, 1)} | geometry.kinds
        inputs = fn.external_source(
            source=source, num_outputs=len(kinds), batch=True, no_copy=True, dtype=[kind for kind, _ in kinds.values()],
            ndim=[dimensions for _, dimensions in kinds.values()],
        )
        given = dict(zip(kinds, inputs))
        data = given["data"]
        options = {"jpeg_fancy_upsampling": True, "adjust_orientation": geometry.by_exif}
        # DALI 2.4's decoders end the whole process (SIGSEGV) on a picture whose header they cannot parse, in batches of
        # some 32 and more; this operator, which comes first since they wait for what it gives, raises as it should
        shape = given["shape"] + 0 * fn.peek_image_shape(data, dtype=types.INT32)[:2]
        window = {"start": given["start"], "shape": shape, "axes": [0, 1]}
        if on_gpu:
            images = fn.slice(fn.decoders.image(data, device="mixed", affine=False, **options), **window)
        else:  # reads only the rows it needs: a quarter less work on CelebA, the same pixels
            images = fn.decoders.image_slice(data, **window, **options)
        if geometry.resizes:  # a square that has the size already comes out of the kernels unchanged
            images = resized(images, given["size"] if geometry.pads else (size, size))
        if geometry.turns:
            images = fn.warp_affine(
                images, matrix=given["turn"], size=given["turned"], interp_type=types.INTERP_NN, inverse_map=True
            )
        if geometry.pads:
            images = fn.slice(images, given["corner"], [size, size], axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)
        if geometry.preprocessing.channels == 1:
            images = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        return images

    pipeline = decoding()
    pipeline.build()
    return pipeline


def resized(images: DataNode, size: DataNode | tuple[int, int]) -> DataNode:
    """`images.kernel` in DALI's words, for pictures that get (height, width) `size`."""
    return fn.resize(images, size=size, mag_filter=types.INTERP_LANCZOS3, min_filter=types.INTERP_LINEAR, antialias=True)


def index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
