"""MNIST and sets in its file format (EMNIST, Fashion-MNIST, …): idx files, gzipped or not, one k-way attribute.

An idx file: two zero bytes, the type of its numbers (8 = unsigned byte), how many dimensions, their sizes as big-endian
32-bit numbers, then the numbers.

Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits", yann.lecun.com/exdb/mnist.
"""

import gzip
import math
import os
import struct
import zlib
from functools import lru_cache, partial

import numpy as np

from pipeline.data.datasets.index import Index
from pipeline.data.datasets.record import Dataset
from pipeline.data.datasets.source import Place, describe_missing
from pipeline.data.datasets.splits import Shares
from pipeline.images import MAX_PIXELS, png_bytes

PARTS = {"train": "train", "test": "t10k"}
FOLDERS = ("", "raw", "MNIST/raw")


def read_mnist(
    source: os.PathLike[str] | str, *, attribute: str = "digit", shares: Shares | None = None, skip_bad: bool = False,
    name: str = "mnist",
) -> Dataset:
    """The index of a folder with the four idx files. The set gives train and test; a tenth of train becomes valid.
    attribute: what the label is called. Raises ValueError: a file is missing, damaged or of another type."""
    source = Place(os.fspath(source))
    folders = [source / part if part else source for part in FOLDERS]
    folder = next((folder for folder in folders if _find(folder, "train-images-idx3-ubyte")), source)
    index, labels = Index(skip_bad), []
    for split, part in PARTS.items():
        place, values = _numbers(folder, part, "labels", 1)
        _, pictures = _numbers(folder, part, "images", 3)
        if len(values) != len(pictures):
            raise ValueError(f"{place} has {len(values):,} labels for {len(pictures):,} pictures; fetch both again")
        width = max(5, len(str(len(values))))
        for number in range(len(values)):
            index.add(f"{split}-{number:0{width}d}", f"{part} {number}", f"{place} record {number}", split)
        labels += values.tolist()
    entry = {"name": attribute, "kind": "k-way", "categories": [str(v) for v in range(max(labels, default=0) + 1)]}
    return index.dataset(name, {"format": "idx"}, [entry], labels, partial(read_picture, folder), shares)


def read_picture(folder: Place, location: str) -> bytes:
    part, _, number = location.partition(" ")
    return png_bytes(_numbers(folder, part, "images", 3)[1][int(number)])


def _find(folder: Place, name: str) -> Place | None:
    return next((place for place in (folder / name, folder / f"{name}.gz") if place.is_file()), None)


@lru_cache(maxsize=8)
def _numbers(folder: Place, part: str, what: str, dimensions: int) -> tuple[str, np.ndarray]:
    """The name of an idx file, and its numbers: uint8, of so many dimensions."""
    name = f"{part}-{what}-idx{dimensions}-ubyte"
    place = _find(folder, name)
    if place is None:
        raise describe_missing(folder, f"{name} or {name}.gz")
    with place.open() as raw:
        file = gzip.GzipFile(fileobj=raw) if place.name.endswith(".gz") else raw
        try:
            head = file.read(4 + 4 * dimensions)
            if len(head) < 4 + 4 * dimensions or head[:4] != bytes((0, 0, 8, dimensions)):
                raise ValueError(f"{place} is no idx file of unsigned bytes with {dimensions} dimensions; fetch it again")
            shape = struct.unpack(f">{dimensions}I", head[4:])
            if dimensions == 3 and not 0 < shape[1] * shape[2] <= MAX_PIXELS:
                raise ValueError(f"{place} says its pictures are {shape[2]}x{shape[1]}; fetch it again")
            data, size = bytearray(), math.prod(shape)
            while len(data) <= size and (more := file.read(1 << 20)):  # never much more than it says
                data += more
        except (zlib.error, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{place} is damaged ({error}); fetch it again") from error
    if len(data) != size:
        much = f"{len(data):,} bytes" if len(data) < size else "more bytes than that"
        raise ValueError(f"{place} says it holds {size:,} bytes of numbers and holds {much}: damaged; fetch it again")
    return place.name, np.frombuffer(data, np.uint8).reshape(shape)
