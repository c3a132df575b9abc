"""A small set in CelebA's file format whose pictures say their own labels: the planted truth of the data tests."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.datasets import Dataset

NAMES = ("Bright", "Red_Left", "Odd")


def labels(number: int) -> tuple[int, int, int]:
    """0/1 of each attribute of picture `number` (from 1)."""
    return number * 7 % 3 % 2, number // 3 % 2, number % 2


def split(number: int) -> int:
    """Neither by position nor by parity: 0 train, 1 valid, 2 test."""
    return (0, 0, 1, 0, 2, 0, 0)[number * 5 % 7]


def picture(number: int) -> np.ndarray:
    """[218, 178, 3]: bright or dark, its left half red or blue, its lower left corner the number itself."""
    bright, red, odd = labels(number)
    out = np.full((218, 178, 3), 60 + 120 * bright, np.uint8)
    out[:, :89, 0 if red else 2] += 70
    out[100:118, 120:, 1] = 250 * odd
    out[180:198, :40] = number % 256
    return out


def seen(array: np.ndarray) -> tuple[int, int, int]:
    """The labels, read off a picture (uint8, 218x178 or its 178x178 crop)."""
    rows = array[20:198] if len(array) == 218 else array
    left = rows[10:70, 10:80].reshape(-1, 3).mean(0)
    return int(rows[10:70, 100:].mean() > 120), int(left[0] > left[2]), int(rows[82:96, 130:, 1].mean() > 125)


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(number)).save(out, "JPEG", quality=92)
    return out.getvalue()


def write_celeba(
    folder: Path,
    count: int,
    *,
    end: str = "\r\n",
    annotation: Callable[[list[str]], list[str]] = list,
    partition: Callable[[list[str]], list[str]] = list,
    places: tuple[str, str, str] = ("", "", ""),
) -> Path:
    """Write the published layout: CRLF, count line, header with a trailing blank, runs of blanks.

    `annotation` and `partition` may change the lines; `places` are the folders of annotation, partition and images.
    """
    pictures = folder / places[2] / "img_align_celeba"
    pictures.mkdir(parents=True)
    for number in range(1, count + 1):
        (pictures / f"{number:06d}.jpg").write_bytes(jpeg(number))
    rows = [f"{n:06d}.jpg " + " ".join(f"{2 * v - 1:2d}" for v in labels(n)) for n in range(1, count + 1)]
    files = (
        (places[0], "list_attr_celeba.txt", annotation([str(count), " ".join(NAMES) + " ", *rows])),
        (places[1], "list_eval_partition.txt", partition([f"{n:06d}.jpg {split(n)}" for n in range(1, count + 1)])),
    )
    for place, name, lines in files:
        (folder / place).mkdir(exist_ok=True)
        (folder / place / name).write_bytes("".join(line + end for line in lines).encode())
    return folder


class Record(NamedTuple):
    """One record of a set's index."""

    key: str
    split: str
    location: str
    labels: np.ndarray
    place: str


def records(dataset: Dataset) -> Iterator[Record]:
    return map(Record, dataset.keys, dataset.splits, dataset.locations, dataset.labels, dataset.places)
