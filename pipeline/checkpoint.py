"""Checkpoints: atomic directories with a digest of every file, found again newest first, never half trusted.

A checkpoint is `RUN/checkpoints/images-000064000/`:

    networks.safetensors    "network/parameter or buffer"
    ema.safetensors         the same names, when a group keeps a moving average
    optimizers.safetensors  "network/parameter/moment"
    state.json              clock, stream counters, and whatever else the run hands over
    digests.json            sha256 of each file above

It is written under a temporary name, flushed to disk and renamed. A reader takes the newest whose digests hold.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.engine import State

log = logging.getLogger(__name__)

FORMAT = 1
_PREFIX = "images-"
_PARTS = ("networks", "ema", "optimizers")


def folder(run: Path) -> Path:
    return run / "checkpoints"


def write(run: Path, images: int, state: State, extra: Mapping[str, Any]) -> Path:
    """Write one checkpoint; it is there whole or not at all.

    Args:
        images: images seen, which names it.
        extra: JSON values that go into state.json.

    Raises:
        OSError: the disk is full or refuses; whatever was there before is untouched.
    """
    target = folder(run) / f"{_PREFIX}{images:012d}"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for part in _PARTS:
            tensors = getattr(state, part)
            if tensors:
                save_file(tensors, temporary / f"{part}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"format": FORMAT, "images": images, **extra}, indent=1))
        digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        (temporary / "digests.json").write_text(json.dumps(digests, indent=1))
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        replaced = temporary.with_suffix(".old")
        if target.exists():
            os.replace(target, replaced)
        os.replace(temporary, target)
        _flush(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def found(run: Path) -> list[Path]:
    """Every checkpoint of a run, newest first, unverified."""
    return sorted((p for p in folder(run).glob(f"{_PREFIX}*") if p.is_dir()), reverse=True)


def latest(run: Path) -> Path | None:
    """The newest checkpoint that holds what its digests say; damaged ones are named in a warning and passed over."""
    for checkpoint in found(run):
        try:
            check(checkpoint)
        except ValueError as error:
            log.warning("%s; the one before it is used", error)
            continue
        return checkpoint
    return None


def check(checkpoint: Path) -> None:
    """Hold a checkpoint against its digests.

    Raises:
        ValueError: it is unfinished or damaged, and how.
    """
    try:
        digests = json.loads((checkpoint / "digests.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{checkpoint} has no readable digests.json: unfinished or damaged") from None
    for name, digest in digests.items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{checkpoint} lacks {name}: damaged")
        if _digest(path) != digest:
            raise ValueError(f"{path} does not match its digest: damaged")


def read(checkpoint: Path) -> tuple[State, dict[str, Any]]:
    """The state of a verified checkpoint, and its state.json.

    Raises:
        ValueError: it was written by a later version.
    """
    extra = json.loads((checkpoint / "state.json").read_text())
    if extra["format"] > FORMAT:
        raise ValueError(f"{checkpoint} has format {extra['format']}, this version reads up to {FORMAT}: upgrade to use it")
    parts = {}
    for part in _PARTS:
        path = checkpoint / f"{part}.safetensors"
        parts[part] = load_file(path) if path.exists() else {}
    return State(**parts), extra


def read_networks(checkpoint: Path, ema: bool = True) -> dict[str, dict[str, Tensor]]:
    """State dicts by network; with `ema` the averaged ones where there are any."""
    tensors = load_file(checkpoint / "networks.safetensors")
    averaged = checkpoint / "ema.safetensors"
    if ema and averaged.exists():
        tensors |= load_file(averaged)
    networks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        network, _, key = name.partition("/")
        networks.setdefault(network, {})[key] = tensor
    return networks


class Writer:
    """Writes checkpoints behind the training's back, one at a time, and keeps the newest few.

    A failed write is reported and training goes on with the older ones intact; `close` raises when the last one failed.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.run = run
        self.keep = keep
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None
        self._error: BaseException | None = None
        for left in folder(run).glob(f".{_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)

    def save(self, images: int, state: State, extra: Mapping[str, Any]) -> None:
        """Take a state (a copy that nobody changes) and write it in the background; waits for the one before."""
        self.wait()
        self._pending = self._pool.submit(self._write, images, state, extra)

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._pending is None:
            return
        try:
            path = self._pending.result()
            self._error = None
            log.info("checkpoint %s", path)
        except OSError as error:
            self._error = error
            log.error("checkpoint not saved: %s; older ones are intact and training goes on", error)
        finally:
            self._pending = None

    def close(self) -> None:
        """Wait, and say so if the last state could not be saved.

        Raises:
            OSError: it could not.
        """
        self.wait()
        self._pool.shutdown()
        if self._error is not None:
            raise OSError(f"the last checkpoint could not be saved: {self._error}") from self._error

    def _write(self, images: int, state: State, extra: Mapping[str, Any]) -> Path:
        path = write(self.run, images, state, extra)
        for old in found(self.run)[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
