"""Twins: the same drawn face or fruit with one attribute changed, kept as JPEGs, so that an edit can be held against the truth.

They lie in SET/source/twins as tars of `KEY.ATTRIBUTE.VALUE.LOOK.jpg`, SPLIT-N.tar each of some records.
"""

import io
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from pipeline.data.datasets.faces import face_twins, jpeg_bytes
from pipeline.data.datasets.fruit import fruit_twins
from pipeline.data.datasets.record import Dataset
from pipeline.data.datasets.workers import Progress, spread, tick
from pipeline.files import replacing

TWINNED = 80  # records of a split, its first ones, that have twins; those of one take a third of a second to draw
_CHUNK = 25
_FOLDER = "twins"
_TWINS: dict[str, Callable[[int, str], Iterator[tuple[str, int, list[Image.Image]]]]] = {
    "faces": face_twins,
    "fruit": fruit_twins,
}


def keep_twins(source: Path, drawn: Dataset, seed: int, workers: int | None, progress: Progress) -> None:
    """Draw the twins of the first records of the valid and the test split, those that are not there yet.

    source: the folder of the drawn pictures. drawn: what was read of it. seed: that they were drawn with.
    """
    jobs = []
    for split in ("valid", "test"):
        keys = sorted((key for key, own in zip(drawn.keys, drawn.splits) if own == split), key=lambda key: key[-6:])[:TWINNED]
        for start in range(0, len(keys), _CHUNK):
            path = source / _FOLDER / f"{split}-{start:06d}.tar"
            jobs.append((path, keys[start : start + _CHUNK]))
    (source / _FOLDER).mkdir(exist_ok=True)
    spread(partial(_draw, drawn.name, seed), jobs, workers, sum(len(keys) for _, keys in jobs), progress, few=0)


def _draw(of: str, seed: int, job: tuple[Path, list[str]]) -> None:
    """Draw the twins of some records into one tar. of: which set they belong to."""
    path, keys = job
    if path.exists():
        return
    with replacing(path, durable=False) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for key in keys:
            tick()
            for name, value, twins in _TWINS[of](seed, key):
                for look, twin in enumerate(twins):
                    data = jpeg_bytes(twin)
                    entry = tarfile.TarInfo(f"{key}.{name}.{value}.{look}.jpg")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


class Twins:
    """The stored twins of a split; none where its set keeps none."""

    def __init__(self, shards: Path, split: str) -> None:
        self._places: dict[tuple[str, str, int], list[tuple[Path, int, int]]] = {}
        for path in sorted((shards / "source" / _FOLDER).glob(f"{split}-*.tar")):
            with tarfile.open(path) as tar:
                for entry in tar:
                    key, name, value, *_ = entry.name.split(".")
                    self._places.setdefault((key, name, int(value)), []).append((path, entry.offset_data, entry.size))

    def __bool__(self) -> bool:
        return bool(self._places)

    def of(self, key: str, name: str, value: int) -> list[bytes]:
        """Return the JPEGs of a record's twin with another value of an attribute, in every look; none where it has none."""
        return [_read(*place) for place in self._places.get((key, name, value), ())]


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
