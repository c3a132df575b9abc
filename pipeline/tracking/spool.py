"""Keep the spool on disk: append-only JSONL files, the pictures beside them, and what each store has received of them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import write_whole
from pipeline.tracking.address import asked_for, named

logger = logging.getLogger(__name__)

FSYNC_SECONDS = 5.0
_TAIL_BYTES = 1 << 20  # in which the last event lies; a long one is a configuration of some 10 kB


def safe(name: str) -> str:
    """Return a name that MLflow takes: letters, digits, underscore, dash, dot, blank, slash."""
    return re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)


def keep_picture(spool: Path, name: str, images: int, png: bytes) -> str:
    """Write a picture's bytes into the spool under a name made from its content; that name, relative to the spool."""
    mark = hashlib.sha256(png).hexdigest()[:16]
    file = f"pictures/{safe(name).replace('/', '~')}-{images:09d}-{mark}.png"
    (spool / "pictures").mkdir(parents=True, exist_ok=True)
    (spool / file).write_bytes(png)
    return file


def as_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            logger.warning("tracking: metric %s is left out: %s", name, error)
    return numbers


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Give nested mappings as dotted keys, and everything else as text."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


class Log:
    """An append-only JSONL file. A line that a crash cut short is closed off before the next one is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._torn = False
        self._synced = time.monotonic()

    def append(self, data: bytes, sync: bool = False) -> None:
        """Write whole lines. After an OSError the same call may be repeated: a line that stands twice does no harm."""
        if self._file is None and (data or sync):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._torn = self.path.exists() and not _ends_a_line(self.path)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if data:
            data = b"\n" + data if self._torn else data
            self._torn = True
            while data:
                data = data[os.write(self._file, data) :]
            self._torn = False
        if self._file is not None and (sync or time.monotonic() - self._synced > FSYNC_SECONDS):
            os.fsync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def last_event(path: Path) -> dict[str, Any] | None:
    """Return the last whole event of a spool file, read from its end; None when there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
        lines = file.read().split(b"\n")[:-1]
    return next((event for line in reversed(lines) if (event := _event(line)) is not None), None)


def _event(line: bytes) -> dict[str, Any] | None:
    """Return the event in a line of a spool; None for a line that a crash cut short."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event and "time" in event else None


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Give the whole lines from a byte offset on: (event or None for a broken line, offset behind it)."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _event(line), offset


def spool_files(spool: Path) -> list[Path]:
    """Return the spool's files, the loop's own first, because it says which run the others belong to."""
    return sorted(spool.glob("*.jsonl"), key=lambda path: (path.name != "main.jsonl", path.name))


def remaining(spool: Path, offsets: Mapping[str, int]) -> int:
    return sum(event is not None for path in spool_files(spool) for event, _ in read_events(path, offsets.get(path.name, 0)))


@dataclass(frozen=True)
class Point:
    """One value of one metric.

    step: images seen. time: milliseconds since 1970. superseded: past a checkpoint that was restored later.
    """

    name: str
    value: float
    step: int
    time: int
    superseded: bool


def points(run: str | Path) -> list[Point]:
    """Return every point that the loop of a run ever logged, in order, with the superseded ones marked."""
    path = spool_of(run) / "main.jsonl"
    rows: list[list[Any]] = []
    for event, _ in read_events(path):
        if event is None:
            continue
        if event["kind"] == "metrics":
            rows += [[name, value, event["step"], event["time"], False] for name, value in event["metrics"].items()]
        elif event["kind"] in ("start", "rewound") and event["from"] > event["step"]:
            for row in rows:
                row[4] |= row[2] > event["step"]
    return [Point(*row) for row in rows]


def spool_of(run: str | Path) -> Path:
    spool = Path(run).resolve() / "spool"
    if not (spool / "main.jsonl").is_file():
        raise ValueError(f"{run} has no tracking spool (spool/main.jsonl): give the folder of a run that was tracked")
    return spool


class State:
    """What each store has received: `spool/state.json`, written by whoever holds the spool's lock. A copy of a run's
    folder has received nothing, so that it does not write into the first's MLflow run; `key` is the tag by which its own
    is found, and `copied_from` the first's folder, until the copy's own state is saved."""

    def __init__(self, path: Path, content: dict[str, Any], uri: str | None) -> None:
        self.path, self._content, self.uri = path, content, uri
        self.copied_from = _copied_from(path.parent, content.get("place"))
        if self.copied_from:
            self._content = content = {"last": content["last"], "targets": {}, "key": uuid.uuid4().hex}
        self.key: str | None = content.get("key")
        target = content["targets"].get(uri, {})
        self.run_id: str | None = target.get("run_id")
        self.offsets: dict[str, int] = dict(target.get("offsets", {}))
        self.refused: int = target.get("refused", 0)
        self.problem: str | None = content.get("problem")

    @staticmethod
    def read(spool: Path, default_uri: str | None = None) -> State:
        """Read it for the store in use: MLFLOW_TRACKING_URI, else where the run went before, else the default."""
        try:
            content = json.loads((spool / "state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            content = {"last": None, "targets": {}}
        uri = asked_for()
        return State(spool / "state.json", content, named(uri) if uri else content["last"] or default_uri)

    def save(self) -> None:
        target = {"run_id": self.run_id, "offsets": self.offsets, "refused": self.refused}
        if self.uri is not None:
            self._content["targets"][self.uri] = target
        self._content |= {"last": self.uri, "problem": self.problem, "place": _place(self.path.parent)}
        write_whole(self.path, json.dumps(self._content, indent=1), durable=False)

    def forget(self) -> None:
        """Send everything anew, because the store no longer has the run."""
        self.run_id, self.offsets, self.refused = None, {}, 0


def _place(spool: Path) -> dict[str, Any]:
    """Return what tells whether a spool is where it was: its machine, its path, and numbers that a renaming keeps."""
    files = (spool, spool / "main.jsonl")
    numbers = [path.stat().st_ino for path in files if path.exists()]
    return {"host": socket.gethostname(), "path": str(spool.resolve()), "numbers": numbers}


def _copied_from(spool: Path, before: dict[str, Any] | None) -> str | None:
    """Return the folder that a spool was copied from; None where it stayed or was moved, from one disk to another too."""
    if before is None:
        return None
    now = _place(spool)
    if now["path"] == before["path"] or now["numbers"] == before["numbers"]:
        return None
    if now["host"] == before["host"] and not Path(before["path"]).exists():
        return None
    return str(Path(before["path"]).parent)


def run_id_of(run: str | Path) -> str | None:
    """Return the MLflow run id of a run's folder in the store in use; None when that store has given none yet."""
    try:
        return State.read(Path(run).resolve() / "spool").run_id
    except OSError:
        return None


def store_of(run: str | Path) -> str | None:
    """Return the store that a run's points go to, with its password; None for MLflow's default, before the first point."""
    return asked_for() or State.read(Path(run).resolve() / "spool").uri


def undelivered(run: str | Path) -> int:
    """Count the events in a run's spool that the store in use does not have; 0 for a run without a spool."""
    spool = Path(run).resolve() / "spool"
    return remaining(spool, State.read(spool).offsets)
