"""Shard sets that lie elsewhere (https://, s3://, …): their files are fetched when first read, and kept here.

The cache is $FADER_CACHE, or `fader` in the user's cache folder; a set's folder in it is called by the digest of its
description, so what is kept is always of that set. FADER_CACHE_GB limits it: the tars that were not opened for longest
go first. Files are fetched part by part, so that a connection that drops costs one part, and a file
takes its place only when its digest is right. All processes of a machine share the cache and fetch nothing twice.
Loaders have the tars of the batches to come fetched ahead, several at a time (`Ahead`).
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.datasets.source import Place
from pipeline.files import digest_of, replacing

PART_BYTES = 8 << 20
FETCHING_THREADS = 4

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("FADER_CACHE") or home / "fader")


def cache_limit() -> int | None:
    """Bytes that cached tars may take; None without a limit. Raises ValueError: FADER_CACHE_GB is no number above 0."""
    text = os.environ.get("FADER_CACHE_GB")
    if not text:
        return None
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return int(float(text) * 1e9)
    raise ValueError(f"FADER_CACHE_GB is {text!r}; a number of gigabytes above 0 is needed")


@dataclass(frozen=True)
class Remote:
    """The files of the set at `place`, kept in `folder`: name to (size, sha256)."""

    place: Place
    folder: Path
    files: dict[str, tuple[int, str]]

    def has(self, name: str) -> bool:
        return _is_whole(self.folder / name, self.files[name][0])

    def fetch(self, name: str, stopped: threading.Event | None = None) -> Path:
        """The local file of this name, fetched if it is not here; gives up, with Stopped, when `stopped` is set. Raises
        OSError: it cannot be read, or the disk is full; ValueError: what came is not what the set says of it."""
        path = self.folder / name
        size, digest = self.files[name]
        if _is_whole(path, size):
            os.utime(path)
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(path, size):
                logger.info("fetching %s (%.1f MB)", self.place / name, size / 1e6)
                _make_room(size)
                fetch(self.place / name, path, size, digest, stopped)
        return path


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


class Stopped(Exception):
    """A fetch was given up because nobody wants it any more."""


def fetch(place: Place, path: Path, size: int, digest: str | None, stopped: threading.Event | None = None) -> None:
    """Copy a file of a known size part by part; it takes its place when it is whole. Raises OSError: it cannot be read,
    or the disk is full; ValueError: it is shorter than `size`, or its sha256 is another."""
    sha256, done = hashlib.sha256(), 0
    with replacing(path, durable=False) as file:
        while done < size:
            if stopped is not None and stopped.is_set():
                raise Stopped(f"{place} after {done:,} bytes")
            part = place.read_part(done, min(PART_BYTES, size - done))
            if not part:
                raise ValueError(f"{place} ends after {done:,} of {size:,} bytes: upload it again")
            file.write(part)
            sha256.update(part)
            done += len(part)
        if digest is not None and sha256.hexdigest() != digest:
            raise ValueError(f"{place} differs from its digest: upload it again")


class Ahead:
    """Fetches files of a set in threads of its own, in the order in which they are wanted, until it is closed."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(FETCHING_THREADS, thread_name_prefix="fetch")
        self._coming: dict[str, Future[None]] = {}

    def want(self, name: str) -> None:
        """Have this file fetched, unless it is here or on its way."""
        coming = self._coming.get(name)
        if (coming is None or coming.done()) and not self._remote.has(name):
            self._coming[name] = self._pool.submit(self._fetch, name)

    def _fetch(self, name: str) -> None:
        try:
            self._remote.fetch(name, self._stopped)
        except Stopped:
            pass
        except (OSError, ValueError) as error:  # whoever reads the file asks again, and is told
            logger.warning("fetching ahead failed: %s", error)

    def close(self) -> None:
        """Give up what is on its way; waits for the parts that are."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)


def _make_room(size: int) -> None:
    """Remove the tars that were not opened for longest until `size` more bytes fit. A process that maps one keeps its bytes."""
    limit = cache_limit()
    if limit is None:
        return
    kept = []
    for path in cache_folder().glob("*/*.tar"):
        try:
            kept.append((path.stat().st_mtime, path.stat().st_size, path))
        except FileNotFoundError:
            continue
    total = sum(entry[1] for entry in kept)
    for _, bytes_, path in sorted(kept):
        if total + size <= limit:
            break
        path.unlink(missing_ok=True)
        total -= bytes_


def publish(folder: Path, place: Place, files: Mapping[str, tuple[int, str]]) -> None:
    """Copy files, name to (size, sha256), of a local folder to an address, unless they lie there already, and read back
    what came. Raises ValueError: one is damaged here or there; OSError: the address cannot be written to."""

    def send(name: str) -> None:
        digest = files[name][1]
        if _digest_there(place / name, files[name][0]) == digest:
            return
        if digest_of(folder / name) != digest:
            raise ValueError(f"{folder / name} differs from its digest; run 'fader verify {folder}'")
        (place / name).write_file(folder / name)
        if _digest_there(place / name, files[name][0]) != digest:
            raise ValueError(f"{place / name} is not what was sent, which is {folder / name}; upload it again")

    with ThreadPoolExecutor(FETCHING_THREADS, thread_name_prefix="send") as pool:
        for _ in pool.map(send, files):
            pass


def _digest_there(place: Place, size: int) -> str | None:
    """The sha256 of the file at an address; None where there is none of that size."""
    if place.size() != size:
        return None
    digest = hashlib.sha256()
    for start in range(0, size, PART_BYTES):
        digest.update(place.read_part(start, min(PART_BYTES, size - start)))
    return digest.hexdigest()
