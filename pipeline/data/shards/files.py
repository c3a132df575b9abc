"""The files of a shard set: their names, tar members byte for byte, and digests."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import BinaryIO

import numpy as np

FORMAT = 1
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Picture formats a shard may hold, as Pillow calls them, and the extension of their members."""
MANIFEST, DESCRIPTION, WORK = "manifest.parquet", "dataset.json", ".prepare"
SHARD_NAME = re.compile(r"(train|valid|test)-\d{6}\.tar")
FIXED_COLUMNS = ("key", "split", "shard", "offset", "size", "digest", "width", "height", "extension")
ORIENTATION = "orientation"
"""A column that sets of earlier versions lack: which way up a picture is stored, 1 to 8, read once by `images.check`."""
BLOCK, RECORD = 512, 10240
_AT_ONCE = 1 << 18  # bytes that go to a file and its digest together: they fit in a core's cache
_MODE, _TIME = b"0000444\0" + 2 * b"0000000\0", b"00000000000\0"
_REST = (b"0" + bytes(100) + b"ustar\x0000" + 2 * b"fader".ljust(32, b"\0")).ljust(BLOCK - 156, b"\0")
_SUM = sum(_MODE + _TIME + _REST + 8 * b" ")
_ZEROS = bytes(BLOCK)


def header(name: str, size: int) -> bytes:
    """A ustar header, byte for byte what webdataset.TarWriter(mtime=0, user="fader", group="fader", mode=0o444) writes.

    Written here because a record costs TarWriter 56 µs and this 4, and because webdataset loads torch into each process.
    """
    stem, (middle, total) = name.encode("ascii"), _middle(size)
    return b"".join((stem.ljust(100, b"\0"), middle, b"%06o\0 " % (total + sum(stem)), _REST))


@lru_cache(maxsize=1 << 14)
def _middle(size: int) -> tuple[bytes, int]:
    """What stands in a header between name and checksum, and the checksum without the name."""
    length = b"%011o\0" % size
    return _MODE + length + _TIME, _SUM + sum(length)


def label_members(names: Sequence[str], kinds: Sequence[str], labels: np.ndarray) -> Iterator[bytes]:
    """The content of KEY.json for each row of labels [N, A], as `json.dumps` writes it."""
    quoted = [json.dumps(name).replace("%", "%%") for name in names]
    form = ", ".join(f"{name}: %{'r' if kind == 'continuous' else 'd'}" for name, kind in zip(quoted, kinds)).join("{}")
    for values in zip(*labels.T.tolist()) if len(names) else ((),) * len(labels):
        yield (form % values).encode()


def member_json(key: str, labels: bytes) -> bytes:
    return header(f"{key}.json", len(labels)) + labels + _ZEROS[: -len(labels) % BLOCK]


class TarWriter:
    """Writes a tar of records part by part, with its size and its digest."""

    def __init__(self, file: BinaryIO) -> None:
        self.size, self.digest = 0, hashlib.sha256()
        self._file, self._written, self._parts = file, 0, list[bytes]()

    def add(self, key: str, extension: str, picture: bytes, labels: bytes) -> int:
        """Add one record; return where its picture begins."""
        start, size = self.size + BLOCK, len(picture)
        rest = _ZEROS[: -size % BLOCK] + member_json(key, labels)
        self._parts += (header(f"{key}.{extension}", size), picture, rest)
        self.size = start + size + len(rest)
        if self.size - self._written > _AT_ONCE:
            self._write()
        return start

    def end(self) -> None:
        end = bytes(2 * BLOCK + -(self.size + 2 * BLOCK) % RECORD)
        self._parts.append(end)
        self.size += len(end)
        self._write()

    def _write(self) -> None:
        data = b"".join(self._parts)
        self.digest.update(data)
        self._file.write(data)
        self._parts.clear()
        self._written = self.size


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
