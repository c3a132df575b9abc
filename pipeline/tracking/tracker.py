"""Track a run from its loop: a queue, and a thread that writes it to the spool and watches the sender process."""

import atexit
import contextlib
import json
import logging
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.tracking.delivery import Child
from pipeline.tracking.spool import Log, State, as_numbers, flatten, keep_picture, last_event, remaining

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

QUEUE_EVENTS = 10_000  # about 30 MB of metrics; reached only when the disk itself stands still


class Tracker:
    """What the loop says about a run. This one keeps nothing, because tracking is off or another rank does it. No method
    raises or waits, `finish` excepted, which waits a bounded time."""

    def start(self, images: int = 0) -> None:
        """Begin, or go on from a checkpoint of `images` seen: points past it are marked as superseded."""

    def log(self, metrics: Mapping[str, float], images: int, updates: int) -> None:
        self._put("metrics", step=images, updates=updates, metrics=dict(metrics))

    def params(self, values: Mapping[str, Any]) -> None:
        """Keep the configuration, nested or flat. On a resume only new keys are added; a changed value becomes a tag."""
        self._put("params", params=dict(values))

    def tags(self, values: Mapping[str, Any]) -> None:
        self._put("tags", tags=dict(values))

    def picture(self, name: str, png: bytes, images: int) -> None:
        self._put("picture", step=images, name=name, png=png)

    def artifact(self, path: str | Path) -> None:
        """Keep a file, which stays where it is until the run is delivered: best one in the run's folder."""
        self._put("artifact", path=os.path.abspath(path))

    def rewound(self, images: int, why: str) -> None:
        """Say that the run went back to a checkpoint of `images` seen while it was running."""
        self._put("rewound", step=images, why=why)

    def finish(self, status: Status) -> None:
        """Say how the run ended."""

    def _put(self, kind: str, **event: Any) -> None:
        """Take an event."""


class MlflowTracker(Tracker):
    """One MLflow run, spooled into `run/spool` and delivered by a child process, unless `deliver` is False (`fader sync
    RUN` does it then). node: None on a single machine; else this node's name, which stands in its system metrics' names."""

    def __init__(self, run: str | Path, experiment: str, run_name: str, *, node: str | None = None, deliver: bool = True) -> None:
        self.spool = Path(run).resolve() / "spool"
        self._about = {"experiment": experiment, "name": run_name, "pid": os.getpid(), "host": socket.gethostname()}
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue(QUEUE_EVENTS)
        self._lost = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write, name="tracking", daemon=True)
        self._sender = Child(self.spool, node, deliver=True) if deliver else None
        self._attempt = self._step = 0

    def start(self, images: int = 0) -> None:
        self._put("start", step=int(images), key=uuid.uuid4().hex, **self._about)
        self._thread.start()
        atexit.register(self._flush, 2.0)

    def finish(self, status: Status, wait_seconds: float = 30.0) -> None:
        """Say how the run ended and wait, a bounded time, until everything is delivered."""
        deadline = time.monotonic() + wait_seconds
        self._put("finish", status=status)
        if self._thread.ident is None or not self._flush(wait_seconds) or self._sender is None:
            return
        try:
            self._sender.wait(max(deadline - time.monotonic(), 0.1))
            state = State.read(self.spool)
            left = remaining(self.spool, state.offsets)
        except OSError as error:
            logger.warning("tracking: %s; 'fader sync %s' delivers what is left", error, self.spool.parent)
            return
        if left:
            why = f" ({state.problem})" if state.problem else ""
            logger.warning(
                "tracking: %d events are not delivered yet%s; they are in %s, 'fader sync %s' delivers them",
                left, why, self.spool, self.spool.parent,
            )  # fmt: skip

    def _put(self, kind: str, **event: Any) -> None:
        try:
            self._queue.put_nowait({"kind": kind, **event, "time": int(time.time() * 1000)})
        except queue.Full:
            self._lost += 1

    def _flush(self, seconds: float) -> bool:
        """Let the thread write what is queued, and end it. Return False when it could not in time."""
        atexit.unregister(self._flush)
        self._closing.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            logger.warning("tracking: %s was not written within %g s; the last points are lost", self.spool, seconds)
        return not self._thread.is_alive()

    def _write(self) -> None:
        """Write the queue to disk and watch the sender, in a thread; end when all is written after closing."""
        log = Log(self.spool / "main.jsonl")
        events: list[dict[str, Any]] = []
        lines: list[bytes] = []
        failing = False
        while True:
            closing = self._closing.is_set()  # read first: what was queued before it is taken below
            events += self._take(1000 - len(events) - len(lines))
            try:
                while events:
                    lines.append(self._encode(events[0], log))
                    del events[0]
                log.append(b"".join(lines), sync=closing)
                lines.clear()
                if failing:
                    logger.warning("tracking: %s can be written again", self.spool)
                failing = False
                if self._sender is not None:
                    self._sender.watch()
                if closing and self._queue.empty():
                    break
            except OSError as error:
                if not failing:
                    logger.warning("tracking: %s cannot be written (%s); points wait in memory", self.spool, error)
                failing = True
                self._closing.wait(1.0)
                if self._closing.is_set():
                    time.sleep(0.2)
        log.close()
        if self._lost:
            logger.warning("tracking: %d points were lost while %s could not be written", self._lost, self.spool)

    def _take(self, most: int) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        with contextlib.suppress(queue.Empty):
            while len(events) < most:
                events.append(self._queue.get(timeout=0 if events or self._closing.is_set() else 0.2))
        return events

    def _encode(self, event: dict[str, Any], log: Log) -> bytes:
        try:
            return self._line(event, log)
        except OSError:
            raise
        except Exception:  # a value nobody foresaw costs this event, not the thread
            logger.exception("tracking: an event (%s) is left out", event.get("kind"))
            return b""

    def _line(self, event: dict[str, Any], log: Log) -> bytes:
        """Return an event as a line of the spool; a picture's bytes go to a file of their own."""
        if event["kind"] == "start":
            copied_from, folder = State.read(self.spool).copied_from, self.spool.parent
            if copied_from:
                logger.warning("tracking: %s is a copy of %s, so it gets an MLflow run of its own", folder, copied_from)
            last = last_event(log.path) or {}
            self._attempt, self._step = last.get("attempt", 0) + 1, last.get("step", 0)
        if event["kind"] in ("start", "rewound"):
            event["from"] = self._step
        self._step = event.setdefault("step", self._step)
        event["attempt"] = self._attempt
        if event["kind"] == "metrics":
            event["metrics"] = as_numbers(event["metrics"])
        elif event["kind"] == "params":
            event["params"] = dict(flatten(event["params"]))
        elif event["kind"] == "tags":
            event["tags"] = {str(key): str(value) for key, value in event["tags"].items()}
        elif event["kind"] == "artifact":
            event["path"] = os.path.relpath(Path(event["path"]).resolve(), self.spool.parent)
        elif event["kind"] == "picture":
            file = keep_picture(self.spool, event["name"], event["step"], event["png"])
            event = {key: value for key, value in event.items() if key != "png"} | {"file": file}
        return json.dumps(event).encode() + b"\n"


class NodeTracker(Tracker):
    """System metrics of one more node of a run, spooled for the main node's sender; the main rank does the rest."""

    def __init__(self, run: str | Path, node: str) -> None:
        self._child = Child(Path(run).resolve() / "spool", node, deliver=False)

    def start(self, images: int = 0) -> None:
        self._child.watch()

    def finish(self, status: Status) -> None:
        self._child.stop()


def open_tracker(
    enabled: bool, run_folder: str | Path, experiment: str, name: str, main: bool,
    *, node: str | None = None, local_main: bool = False,
) -> Tracker:  # fmt: skip
    """Return the tracker of this rank: rank 0 (main) alone reports; the first rank of each other node (local_main)
    samples the system. node: this node's name when there are several."""
    if enabled and main:
        return MlflowTracker(run_folder, experiment, name, node=node)
    if enabled and local_main and node is not None:
        return NodeTracker(run_folder, node)
    return Tracker()
