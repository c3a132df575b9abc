"""MNIST and sets in its file format (EMNIST, Fashion-MNIST, …): idx files, gzipped or not, one k-way attribute.

An idx file: two zero bytes, the type of its numbers (8 = unsigned byte), how many dimensions, their sizes as big-endian
32-bit numbers, then the numbers.

Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits", yann.lecun.com/exdb/mnist.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.data.datasets.record import Dataset
from pipeline.data.datasets.source import Place, describe_missing, unpacked
from pipeline.data.datasets.splits import Shares, assign
from pipeline.images import MAX_PIXELS, png_bytes

PARTS = {"train": "train", "test": "t10k"}
FOLDERS = ("", "raw", "MNIST/raw")


@dataclass(frozen=True)
class IdxReader:
    """Reads picture `PART NUMBER` as a grey PNG."""

    folder: Place

    def __call__(self, location: str) -> bytes:
        part, _, number = location.partition(" ")
        return png_bytes(_numbers(_file(self.folder, f"{part}-images-idx3-ubyte"), 3)[int(number)])


def read_mnist(
    source: os.PathLike[str] | str,
    *,
    attribute: str = "digit",
    shares: Shares | None = None,
    skip_bad: bool = False,
    name: str = "mnist",
) -> Dataset:
    """The index of a folder with the four idx files. The set gives train and test; a tenth of train becomes valid.

    Args:
        source: the folder.
        attribute: what to call the label.
        shares: split the records anew.
        skip_bad: nothing to skip: a damaged idx file says nothing of where its records lie.

    Raises:
        ValueError: a file is missing, damaged, of another type, or pictures and labels differ in number.
    """
    source = Place(os.fspath(source))
    first = f"{PARTS['train']}-images-idx3-ubyte"
    folder = next((f for f in (source / part if part else source for part in FOLDERS) if _has(f, first)), None)
    if folder is None:
        raise describe_missing(source, f"{first}.gz or {first}")
    keys, given, locations, places, labels = [], [], [], [], []
    for split, part in PARTS.items():
        place = _file(folder, f"{part}-labels-idx1-ubyte")
        values, pictures = _numbers(place, 1), _numbers(_file(folder, f"{part}-images-idx3-ubyte"), 3)
        if len(values) != len(pictures):
            raise ValueError(f"{place.name} has {len(values):,} labels for {len(pictures):,} pictures; fetch both again")
        width = max(5, len(str(len(values))))
        keys += [f"{split}-{number:0{width}d}" for number in range(len(values))]
        given += [split] * len(values)
        locations += [f"{part} {number}" for number in range(len(values))]
        places += [f"{place.name} record {number}" for number in range(len(values))]
        labels += values.tolist()
    categories = [str(value) for value in range(max(labels, default=0) + 1)]
    splits, how = assign(keys, given=given, shares=shares)
    return Dataset(
        name=name,
        source={"format": "idx", "split": how},
        attribute_list=[{"name": attribute, "kind": "k-way", "categories": categories}],
        keys=keys,
        splits=splits,
        locations=locations,
        labels=np.array(labels, np.float32).reshape(-1, 1),
        places=places,
        read=IdxReader(folder),
    )


def _has(folder: Place, name: str) -> bool:
    return (folder / f"{name}.gz").is_file() or (folder / name).is_file()


def _file(folder: Place, name: str) -> Place:
    for candidate in (name, f"{name}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise describe_missing(folder, f"{name} or {name}.gz")


@lru_cache(maxsize=8)
def _numbers(place: Place, dimensions: int) -> np.ndarray:
    """The numbers of an idx file, mapped rather than read: uint8, of so many dimensions.

    Raises:
        ValueError: no idx file of unsigned bytes, or shorter or longer than it says.
    """
    shape: tuple[int, ...] = ()

    def size_of(head: bytes) -> int:
        nonlocal shape
        if len(head) < 4 + 4 * dimensions or head[:2] != b"\0\0" or head[2:4] != bytes((8, dimensions)):
            raise ValueError(f"{place} is no idx file of unsigned bytes with {dimensions} dimensions; fetch it again")
        shape = struct.unpack(f">{dimensions}I", head[4:])
        if dimensions == 3 and not 0 < shape[1] * shape[2] <= MAX_PIXELS:
            raise ValueError(f"{place} says its pictures are {shape[2]}x{shape[1]}; fetch it again")
        return len(head) + math.prod(shape)

    with unpacked(place, 4 + 4 * dimensions, size_of) as file:
        expected, size = 4 + 4 * dimensions + math.prod(shape), os.fstat(file.fileno()).st_size
        if expected != size:
            much = f"{size:,} bytes" if size < expected else "more bytes than that"
            raise ValueError(f"{place} says it is {expected:,} bytes and holds {much}: damaged; fetch it again")
        if not shape[0]:
            return np.zeros(shape, np.uint8)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
