"""Write a file or a folder whole: under another name first, flushed to the disk, then renamed into place."""

import contextlib
import getpass
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: Path, work: Path | None = None, durable: bool = True) -> Iterator[BinaryIO]:
    """Give a binary file that takes its place under `path` when it is whole; an exception leaves what was there.
    work: the folder for the unfinished file, on the same disk; by default it is a hidden file beside `path`.
    durable: also survive a loss of power; what is made anew at each start does not need it.
    Raises OSError: the disk is full or refuses."""
    token = secrets.token_hex(4)
    temporary = work / f"{path.name}.{token}.part" if work else path.with_name(f".{path.name}.{token}.part")
    try:
        with open(temporary, "xb", buffering=1 << 20) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes, durable: bool = True) -> Path:
    """Write a file, and the folders it lies in; text as UTF-8. Returns its path.
    Raises OSError: the disk is full or refuses; the file is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return path


def write_all(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files by name into a folder, which is made where it is missing: all or none. Returns their paths.
    Raises OSError: the disk is full or refuses; the folder's files are as they were."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as written:
        for name, content in contents.items():
            file = written.enter_context(replacing(folder / name))
            file.write(content)
            file.flush()
    return [folder / name for name in contents]


def write_json(path: Path, tree: Any, indent: int | None = 1, work: Path | None = None) -> None:
    """Write a JSON file whole, with a line break at its end."""
    with replacing(path, work) as file:
        file.write(json.dumps(tree, indent=indent).encode() + b"\n")


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder that takes its place under `path` when all its files are on the disk.
    A folder that stood there goes when the new one stands. A kill leaves `.NAME.….tmp`, which is unfinished, or `.NAME.….old`,
    which is whole and was about to be replaced.
    Raises OSError: the disk is full or refuses; what was there before is untouched."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    replaced = temporary.with_suffix(".old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            flush(written)
        if path.exists():
            os.replace(path, replaced)
        os.replace(temporary, path)
        flush(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        raise


def file_name(text: str) -> str:
    """Any text, as an attribute's name, as the name of a file: other letters than those of words, - and . become _."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text)


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def ensure_home() -> None:
    """Give this process and its children a home folder and a user's name where the system knows none, as in a container.
    MLflow cannot be imported without the one, torch compiles nothing without the other."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.gettempdir()
    try:
        getpass.getuser()
    except (OSError, KeyError):
        os.environ["USER"] = str(os.getuid())
