"""Where a set is read from: a path of this machine, or any address that fsspec knows (s3://, https://, zip://)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, BinaryIO, TypeVar

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_SMALL = 1 << 16  # bytes; the size of a file that has fewer need not be asked
RETRIES, FIRST_WAIT_SECONDS = 6, 0.5  # 15 seconds of pauses in all
PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
"""Extensions of what counts as a picture when a folder is listed."""
_LITTER = {
    "__macosx", "@eadir", "$recycle.bin", "#recycle", "@recycle", "#snapshot", "system volume information", "lost+found",
    "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip
"""Names, in small letters, of what operating systems leave in folders."""


def is_remote(address: str | os.PathLike[str]) -> bool:
    """Whether this is an address with a protocol, for fsspec, rather than a path."""
    return "://" in os.fspath(address)


@dataclass(frozen=True)
class Place:
    """A file or folder, here or at an address, with what readers of sets ask of one. It pickles. Remote reading is tried
    again a few times, unless there is no such file or it may not be read. What cannot be read or written raises an OSError."""

    address: str

    def __post_init__(self) -> None:
        if self.address.startswith("~"):
            object.__setattr__(self, "address", os.path.expanduser(self.address))

    def __truediv__(self, name: str) -> Place:
        if is_remote(name) or os.path.isabs(name) or name.startswith("~/"):
            return Place(name)
        if not self.remote:
            return Place(os.path.join(self.address, name))
        first, chain, rest = self.address.partition("::")
        return Place(f"{first if first.endswith('://') else first.rstrip('/') + '/'}{name}{chain}{rest}")

    def __str__(self) -> str:
        return self.address

    @property
    def remote(self) -> bool:
        return is_remote(self.address)

    @property
    def name(self) -> str:
        return self.address.partition("::")[0].rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Place:
        if not self.remote:
            return Place(os.path.dirname(self.address.rstrip("/")) or ".")
        first, chain, rest = self.address.partition("::")
        protocol, slashes, path = first.partition("://")
        return Place(f"{protocol}{slashes}{path.rstrip('/').rpartition('/')[0]}{chain}{rest}")

    def is_file(self) -> bool:
        return self._ask(lambda system, path: system.isfile(path))

    def is_dir(self) -> bool:
        return self._ask(lambda system, path: system.isdir(path))

    def read_bytes(self) -> bytes:
        return self._ask(lambda system, path: system.cat_file(path))

    def open(self) -> BinaryIO:
        return self._ask(lambda system, path: system.open(path, "rb"))

    def read_part(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer where the file ends before."""
        return self._ask(lambda system, path: system.cat_file(path, start=offset, end=offset + size))

    def size(self) -> int | None:
        """Bytes of the file that lies here; None where there is none."""
        return self._ask(lambda system, path: system.size(path) if system.isfile(path) else None)

    def write_file(self, path: str | os.PathLike[str]) -> None:
        def put(system: AbstractFileSystem, there: str) -> None:
            system.makedirs(system._parent(there), exist_ok=True)
            system.put_file(os.fspath(path), there)
            system.invalidate_cache()

        self._ask(put)

    def folders(self) -> list[str]:
        """Names of the folders in this one, sorted, without hidden ones and those that operating systems leave."""
        entries = self._ask(lambda system, path: system.ls(path, detail=True))
        names = [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]
        return sorted(name for name in names if not is_litter(name))

    def files(self) -> list[str]:
        """Names of all files in this folder and those below it, relative to it, sorted.

        A folder that is a link is entered, too, but for one that leads to a folder above it.
        """
        return sorted(self._ask(_remote_files) if self.remote else _local_files(self.address))

    def _ask(self, question: Callable[[AbstractFileSystem, str], Result]) -> Result:
        """What the file system answers. Raises OSError, at an address after some trials, whatever its library raises."""
        for trial in range(RETRIES):
            try:
                return question(*_file_system(self.address))
            except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError):
                raise
            except (ImportError, ValueError) as error:
                raise ValueError(f"{self.address} cannot be opened: {error}") from error
            except Exception as error:
                if not self.remote:
                    raise
                if trial == RETRIES - 1:
                    words = str(error) or type(error).__name__
                    raise OSError(f"{self.address} cannot be read, tried {RETRIES} times: {words}") from error
            time.sleep(FIRST_WAIT_SECONDS * 2**trial)
        raise AssertionError("unreachable")


def _file_system(address: str) -> tuple[AbstractFileSystem, str]:
    """fsspec's file system for an address, and the path in it; fsspec keeps its connections, archives are kept here."""
    if not is_remote(address):
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem(), os.path.abspath(address)
    first, chain, rest = address.partition("::")
    if not chain:
        return _opened(address)
    protocol, _, path = first.partition("://")
    return _opened_archive(f"{protocol}://::{rest}")[0], path


def _opened(address: str) -> tuple[AbstractFileSystem, str]:
    from fsspec.core import url_to_fs

    return url_to_fs(address)


_opened_archive = lru_cache(maxsize=16)(_opened)


def _remote_files(system: AbstractFileSystem, path: str) -> list[str]:
    root = system._strip_protocol(path).rstrip("/") + "/"
    return [name.removeprefix(root).lstrip("/") for name in system.find(path)]


def _local_files(folder: str, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Files below a folder, by names that begin with the prefix. above: the folders that this one lies in."""
    about = os.stat(folder)
    here = (about.st_dev, about.st_ino)
    if here in above:
        return
    with os.scandir(folder) as listing:
        entries = list(listing)
    for entry in entries:
        if _is_folder(entry):
            yield from _local_files(entry.path, f"{prefix}{entry.name}/", above | {here})
        else:
            yield prefix + entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether this is a folder or a link to one; a link to itself is neither."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_litter(name: str) -> bool:
    """Whether a part of a relative name is hidden, or is one that operating systems leave in folders."""
    return any(part.startswith(".") or part.lower() in _LITTER for part in name.split("/"))


def tell_not_taken(source: Place, names: Iterable[str]) -> None:
    """Log how many files of each kind were not taken, with the name of the first of each; litter only by number."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        extension = os.path.splitext(name)[1].lower() or "no extension"
        kinds.setdefault("hidden" if is_litter(name) else extension, []).append(name)
    if kinds:
        counts = ", ".join(f"{len(those):,} {kind} ({those[0]})" for kind, those in sorted(kinds.items()))
        logger.warning("%s: files that are not taken: %s", source, counts)


def read_in(folder: Place, name: str) -> bytes:
    if folder.remote or is_remote(name) or name.startswith("~"):
        return (folder / name).read_bytes()
    path = name if name.startswith("/") else f"{folder.address.rstrip('/')}/{name}"  # `os.path.join` takes longer
    handle = os.open(path, os.O_RDONLY)  # `open` takes twice as long for a small file
    try:
        data = os.read(handle, _SMALL)
        return data if len(data) < _SMALL else data + os.read(handle, os.fstat(handle).st_size)
    finally:
        os.close(handle)


def describe_missing(place: Place, what: str) -> ValueError:
    """The error for a source that lacks something; it says whether the source is there at all."""
    there = place.is_dir() or place.is_file()
    return ValueError(f"{place} has no {what}" if there else f"{place} has no {what}; there is no such folder or file")
