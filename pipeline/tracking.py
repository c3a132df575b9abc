"""MLflow runs: parameters, metrics, pictures, artifacts. What happens to the server never reaches the training loop.

    loop ─put─▶ bounded queue ─thread─▶ RUN/spool/main.jsonl ─sender process─▶ MLflow

The loop only puts an event into a queue. A thread appends it to the run's spool, an append-only JSONL file, and a child
process reads the spool and delivers to MLflow. The child is a process and not a thread for two reasons: importing and
calling MLflow takes the interpreter's lock for milliseconds at a time, which a fast step would feel; and the short time
limits that delivery wants for HTTP are environment variables, which so stay the child's own (`_SENDER_ENVIRONMENT`).

What was delivered is kept for each store (tracking URI) in `spool/state.json` as an offset into the spool. A store that
does not answer is asked again; one that lost the run gets a new run and all points again; `sync` delivers later, to the
same store or to another one. Every point keeps the time and the step (images seen) at which it was logged, so a
point that is sent twice is the same row in MLflow. Pictures carry a name made from their content for the same reason.

After a resume or a return to an older checkpoint the points past it are superseded. MLflow cannot delete points, so
they are marked: `points` says of each whether it is superseded, and the MLflow run has a tag `rewound.TIME` that says
from which images seen back to which, and why: what was logged before TIME past that checkpoint is superseded.

What is found out about a run afterwards (`add`) goes through a spool file of its own, `RUN/spool/later.jsonl`, and the
same sender. It is no part of the loop's story: it neither supersedes points nor changes the run's status.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import getpass
import hashlib
import json
import logging
import math
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

QUEUE_EVENTS = 10_000  # about 30 MB of metrics; reached only when the disk itself stands still
POLL_SECONDS = 0.5
BACKOFF_SECONDS = 10.0
SAMPLE_SECONDS = 10.0  # system metrics
FSYNC_SECONDS = 5.0
LOCK_PATIENCE_SECONDS = 20.0

# MLflow's own defaults wait 246 s for a server that is gone (7 retries) and 120 s for one that hangs. Delivery has its
# own patience, so one short try is right. Set for the sender process only, and only where the user has not set them.
_SENDER_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # MLflow reports its use to its makers; a training job should not
    "OMP_NUM_THREADS": "1",
}
_MAX_METRICS, _MAX_PARAMS, _MAX_PARAM_CHARACTERS, _MAX_TAG_CHARACTERS = 1000, 100, 6000, 5000


class Tracker(Protocol):
    """What the loop may say about a run. No method raises or waits, `finish` excepted, which waits a bounded time."""

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None until a store has given one."""
        ...

    def start(self, images: int = 0) -> None:
        """Begin, or go on from a checkpoint of `images` seen: points past it are marked as superseded."""
        ...

    def log(self, metrics: Mapping[str, float], images: int, updates: int) -> None: ...

    def params(self, values: Mapping[str, Any]) -> None:
        """The configuration, nested or flat. On a resume only new keys are added; a changed value becomes a tag."""
        ...

    def tags(self, values: Mapping[str, Any]) -> None: ...

    def picture(self, name: str, png: bytes, images: int) -> None: ...

    def artifact(self, path: str | Path) -> None:
        """A file that stays where it is until the run is delivered: best one in the run's folder."""
        ...

    def rewound(self, images: int, why: str) -> None:
        """The run went back to a checkpoint of `images` seen while it was running."""
        ...

    def finish(self, status: Status) -> None: ...


class NullTracker:
    """Says nothing to nobody: for tracking switched off and for all ranks but one."""

    run_id: str | None = None

    def start(self, images: int = 0) -> None: ...

    def log(self, metrics: Mapping[str, float], images: int, updates: int) -> None: ...

    def params(self, values: Mapping[str, Any]) -> None: ...

    def tags(self, values: Mapping[str, Any]) -> None: ...

    def picture(self, name: str, png: bytes, images: int) -> None: ...

    def artifact(self, path: str | Path) -> None: ...

    def rewound(self, images: int, why: str) -> None: ...

    def finish(self, status: Status) -> None: ...


class MlflowTracker:
    """One MLflow run, spooled into the run's folder and delivered by a child process.

    Args:
        run: the run's folder; the spool is `run/spool`.
        experiment: the MLflow experiment's name.
        run_name: the run's name in MLflow.
        run_id: the MLflow run to go on with; the spool's own record of it comes first.
        node: None on a single machine; else this node's name, which stands in its system metrics' names.
        deliver: False spools only; `fader sync RUN` delivers.
    """

    def __init__(
        self,
        run: str | Path,
        experiment: str,
        run_name: str,
        run_id: str | None = None,
        *,
        node: str | None = None,
        deliver: bool = True,
    ) -> None:
        self.spool = Path(run).resolve() / "spool"
        self._about = {"experiment": experiment, "name": run_name, "run_id": run_id}
        self._node = node
        self._deliver = deliver
        self._given_run_id = run_id
        self._run_id: str | None = None
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue(QUEUE_EVENTS)
        self._lost = 0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._sender: _Child | None = None
        self._attempt = 0
        self._step = 0

    @property
    def run_id(self) -> str | None:
        if self._run_id is None:
            self._run_id = run_id_of(self.spool.parent)
        return self._run_id or self._given_run_id

    def start(self, images: int = 0) -> None:
        if self._thread is not None:
            return
        host = {"pid": os.getpid(), "host": socket.gethostname()}
        self._put({"kind": "start", "step": int(images), "key": uuid.uuid4().hex, **self._about, **host})
        self._sender = _Child(self.spool, self._node, deliver=True) if self._deliver else None
        self._thread = threading.Thread(target=self._write, name="tracking", daemon=True)
        self._thread.start()
        atexit.register(self._flush, 2.0)

    def log(self, metrics: Mapping[str, float], images: int, updates: int) -> None:
        self._put({"kind": "metrics", "step": images, "updates": updates, "metrics": dict(metrics)})

    def params(self, values: Mapping[str, Any]) -> None:
        self._put({"kind": "params", "params": dict(values)})

    def tags(self, values: Mapping[str, Any]) -> None:
        self._put({"kind": "tags", "tags": dict(values)})

    def picture(self, name: str, png: bytes, images: int) -> None:
        self._put({"kind": "picture", "step": images, "name": name, "png": png})

    def artifact(self, path: str | Path) -> None:
        self._put({"kind": "artifact", "path": os.path.abspath(path)})

    def rewound(self, images: int, why: str) -> None:
        self._put({"kind": "rewound", "step": images, "why": why})

    def finish(self, status: Status, wait_seconds: float = 30.0) -> None:
        """Say how the run ended and wait, a bounded time, until everything is delivered."""
        deadline = time.monotonic() + wait_seconds
        self._put({"kind": "finish", "status": status})
        if self._thread is None or not self._flush(wait_seconds):
            return
        if self._sender is None:
            return
        try:
            self._sender.wait(max(deadline - time.monotonic(), 0.1))
            state = _State.read(self.spool)
            left = _remaining(self.spool, state.offsets)
        except OSError as error:
            logger.warning("tracking: %s; 'fader sync %s' delivers what is left", error, self.spool.parent)
            return
        if left:
            why = f" ({state.problem})" if state.problem else ""
            logger.warning(
                "tracking: %d events are not delivered yet%s; they are in %s, 'fader sync %s' delivers them",
                left, why, self.spool, self.spool.parent,
            )  # fmt: skip

    # --- from the queue to the spool --------------------------------------------------------------------------------

    def _put(self, event: dict[str, Any]) -> None:
        event["time"] = int(time.time() * 1000)
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self._lost += 1

    def _flush(self, seconds: float) -> bool:
        """Let the thread write what is queued and end. False when it could not in time."""
        atexit.unregister(self._flush)
        self._closing.set()
        assert self._thread is not None
        self._thread.join(seconds)
        if self._thread.is_alive():
            logger.warning("tracking: %s was not written within %g s; the last points are lost", self.spool, seconds)
        return not self._thread.is_alive()

    def _write(self) -> None:
        """The thread: queue to disk, and an eye on the sender. Ends when closing and all is written."""
        log = _Log(self.spool / "main.jsonl")
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
        events = []
        try:
            while len(events) < most:
                events.append(self._queue.get(timeout=0 if events or self._closing.is_set() else 0.2))
        except queue.Empty:
            pass
        return events

    def _encode(self, event: dict[str, Any], log: _Log) -> bytes:
        try:
            return self._line(event, log)
        except OSError:
            raise
        except Exception:  # a value nobody foresaw costs this event, not the thread
            logger.exception("tracking: an event (%s) is left out", event.get("kind"))
            return b""

    def _line(self, event: dict[str, Any], log: _Log) -> bytes:
        """One event as a line of the spool; a picture's bytes go to a file of their own."""
        if event["kind"] == "start":
            last = log.last() or {}
            self._attempt, self._step = last.get("attempt", 0) + 1, last.get("step", 0)
        if event["kind"] in ("start", "rewound"):
            event["from"] = self._step
        self._step = event.setdefault("step", self._step)
        event["attempt"] = self._attempt
        if event["kind"] == "metrics":
            event["metrics"] = _numbers(event["metrics"])
        elif event["kind"] == "params":
            event["params"] = dict(flatten(event["params"]))
        elif event["kind"] == "tags":
            event["tags"] = {str(key): str(value) for key, value in event["tags"].items()}
        elif event["kind"] == "picture":
            file = _keep_picture(self.spool, event["name"], event["step"], event["png"])
            event = {key: value for key, value in event.items() if key != "png"} | {"file": file}
        return json.dumps(event).encode() + b"\n"


class NodeTracker(NullTracker):
    """System metrics of one more node of a run, spooled for the main node's sender; the main rank does the rest."""

    def __init__(self, run: str | Path, node: str) -> None:
        self._child = _Child(Path(run).resolve() / "spool", node, deliver=False)

    def start(self, images: int = 0) -> None:
        self._child.watch()

    def finish(self, status: Status) -> None:
        self._child.stop()


def open_tracker(
    enabled: bool,
    run_folder: str | Path,
    experiment: str,
    name: str,
    main: bool,
    *,
    run_id: str | None = None,
    node: str | None = None,
    local_main: bool = False,
) -> Tracker:
    """The tracker of this rank.

    Args:
        enabled: False gives the null tracker to everyone.
        run_folder: the run's folder, shared by all nodes.
        experiment, name: what MLflow calls the experiment and the run.
        main: whether this is rank 0, the only one that reports.
        run_id: the MLflow run a resumed run goes on with.
        node: this node's name when there are several.
        local_main: whether this is its node's first rank, which samples the system.
    """
    if enabled and main:
        return MlflowTracker(run_folder, experiment, name, run_id, node=node)
    if enabled and local_main and node is not None:
        return NodeTracker(run_folder, node)
    return NullTracker()


# --- the spool --------------------------------------------------------------------------------------------------------


def _safe(name: str) -> str:
    """A name MLflow takes: letters, digits, underscore, dash, dot, blank, slash."""
    return re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)


def _keep_picture(spool: Path, name: str, images: int, png: bytes) -> str:
    """Write a picture's bytes into the spool under a name made from its content; that name, relative to the spool."""
    mark = hashlib.sha256(png).hexdigest()[:16]
    file = f"pictures/{_safe(name).replace('/', '~')}-{images:09d}-{mark}.png"
    (spool / "pictures").mkdir(parents=True, exist_ok=True)
    (spool / file).write_bytes(png)
    return file


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            logger.warning("tracking: metric %s is left out: %s", name, error)
    return numbers


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings to dotted keys; everything else as text."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


class _Log:
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

    def last(self) -> dict[str, Any] | None:
        return _last(self.path)


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _last(path: Path) -> dict[str, Any] | None:
    """The last whole event of a spool file, read from its end; None when there is none."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        end = file.seek(0, os.SEEK_END)
        block = 1 << 16
        while end:
            start = max(end - block, 0)
            file.seek(start)
            lines = file.read(end - start).split(b"\n")
            for line in reversed(lines[1:-1] if start else lines[:-1]):
                event = _event(line)
                if event is not None:
                    return event
            if start == 0:
                break
            block *= 8
    return None


def _event(line: bytes) -> dict[str, Any] | None:
    """A line of a spool; None for one that a crash cut short."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event and "time" in event else None


def _events(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """The whole lines from a byte offset on: (event or None for a broken line, offset behind it)."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _event(line), offset


def _files(spool: Path) -> list[Path]:
    """The spool's files, the loop's own first: it says which run the others belong to."""
    return sorted(spool.glob("*.jsonl"), key=lambda path: (path.name != "main.jsonl", path.name))


def _remaining(spool: Path, offsets: Mapping[str, int]) -> int:
    """Events not delivered yet."""
    return sum(
        event is not None for path in _files(spool) for event, _ in _events(path, offsets.get(path.name, 0))
    )


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
    """Every point the loop of a run ever logged, in order, with the superseded ones marked.

    Raises:
        ValueError: the run has no spool.
    """
    path = _spool_of(run) / "main.jsonl"
    found: list[list[Any]] = []
    for event, _ in _events(path):
        if event is None:
            continue
        if event["kind"] == "metrics":
            found += [[name, value, event["step"], event["time"], False] for name, value in event["metrics"].items()]
        elif event["kind"] in ("start", "rewound") and event["from"] > event["step"]:
            for point in found:
                point[4] |= point[2] > event["step"]
    return [Point(*point) for point in found]


def _spool_of(run: str | Path) -> Path:
    spool = Path(run).resolve() / "spool"
    if not (spool / "main.jsonl").is_file():
        raise ValueError(f"{run} has no tracking spool (spool/main.jsonl): give the folder of a run that was tracked")
    return spool


class _State:
    """What each store has received: `spool/state.json`, written by whoever holds the spool's lock."""

    def __init__(self, path: Path, content: dict[str, Any], uri: str | None) -> None:
        self.path, self._content, self.uri = path, content, uri
        target = content["targets"].get(uri, {})
        self.run_id: str | None = target.get("run_id")
        self.offsets: dict[str, int] = dict(target.get("offsets", {}))
        self.refused: int = target.get("refused", 0)
        self.problem: str | None = content.get("problem")

    @staticmethod
    def read(spool: Path, default_uri: str | None = None) -> _State:
        """The state for the store in use: MLFLOW_TRACKING_URI, else where the run went before, else the default."""
        try:
            content = json.loads((spool / "state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            content = {"last": None, "targets": {}}
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        return _State(spool / "state.json", content, _named(uri) if uri else content["last"] or default_uri)

    def save(self) -> None:
        target = {"run_id": self.run_id, "offsets": self.offsets, "refused": self.refused}
        if self.uri is not None:
            self._content["targets"][self.uri] = target
        self._content |= {"last": self.uri, "problem": self.problem}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._content, indent=1))
        os.replace(temporary, self.path)

    def forget(self) -> None:
        self.run_id, self.offsets, self.refused = None, {}, 0


def without_password(uri: str) -> str:
    """An address as it may be shown and kept."""
    return re.sub(r"(?<=://)[^/@]*@", "", uri)


def _named(uri: str) -> str:
    """A store's name in files: no password, and a relative SQLite path made absolute."""
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return "sqlite:///" + os.path.abspath(uri.removeprefix("sqlite:///"))
    return without_password(uri)


def run_id_of(run: str | Path) -> str | None:
    """The MLflow run id of a run's folder in the store in use, None when that store has given none yet."""
    try:
        return _State.read(Path(run).resolve() / "spool").run_id
    except OSError:
        return None


def store_of(run: str | Path) -> str | None:
    """The store (tracking URI) a run's points go to; None when that is not settled yet: MLflow's default then."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _State.read(Path(run).resolve() / "spool").uri


def undelivered(run: str | Path) -> int:
    """Events in a run's spool that the store in use does not have; 0 for a run without a spool."""
    spool = Path(run).resolve() / "spool"
    return _remaining(spool, _State.read(spool).offsets)


# --- the sender process -----------------------------------------------------------------------------------------------


class _Child:
    """The sender process, seen from the training process: started, started again when it died, never in the way."""

    def __init__(self, spool: Path, node: str | None, deliver: bool) -> None:
        self._spool, self._node, self._deliver = spool, node, deliver
        self._process: subprocess.Popen[bytes] | None = None
        self._started = -math.inf
        self._starts = 0
        self._looked = time.monotonic()
        self._problem = False

    def watch(self) -> None:
        """Called often, by one thread. An OSError is reported, and the rest of the tracker goes on."""
        now = time.monotonic()
        ended = self._process is None or self._process.poll()
        if ended and now - self._started > 60 and self._starts < 10:
            if self._starts:
                log = self._spool / "sender.log"
                logger.warning("tracking: the sender process ended, see %s; starting it again", log)
            self._started, self._starts = now, self._starts + 1
            try:
                self._process = self._start()
            except OSError as error:
                logger.warning("tracking: no sender process (%s); points are kept in %s", error, self._spool)
        if self._deliver and now - self._looked > 10:
            self._looked = now
            self._report()

    def _report(self) -> None:
        try:
            problem = _State.read(self._spool).problem
        except OSError:
            return  # told by whoever writes the spool
        if problem and not self._problem:
            logger.warning("tracking: %s; they are kept in %s and training goes on", problem, self._spool)
        elif self._problem and not problem:
            logger.warning("tracking: MLflow takes points again")
        self._problem = bool(problem)

    def _start(self) -> subprocess.Popen[bytes]:
        self._spool.mkdir(parents=True, exist_ok=True)
        options = ["--parent", str(os.getpid())]
        options += [] if self._node is None else ["--node", self._node]
        options += [] if self._deliver else ["--sample-only"]
        with (self._spool / "sender.log").open("ab") as log:
            return subprocess.Popen(
                _command(self._spool, *options),
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the trainer; the sender goes when its work is done
            )

    def wait(self, seconds: float) -> None:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self.wait(5)


def _command(spool: Path, *options: str) -> list[str]:
    # -P keeps the working folder off the module path: a file there cannot stand in for a library's
    return [sys.executable, "-P", "-m", "pipeline.tracking", str(spool), *options]


def _environment() -> dict[str, str]:
    environment = _SENDER_ENVIRONMENT | dict(os.environ)
    ours = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([ours, *filter(None, [environment.get("PYTHONPATH")])])
    return environment


@dataclass(frozen=True)
class Delivery:
    """What `sync` did. refused: events the store will never take (see `spool/sender.log`)."""

    uri: str
    run_id: str
    sent: int
    refused: int


def sync(run: str | Path, again: bool = False) -> Delivery:
    """Deliver what is left of a run's spool, now; create the MLflow run if there is none.

    The store is MLFLOW_TRACKING_URI, else the one the run went to before, else MLflow's default.

    Args:
        run: the run's folder.
        again: send everything from the beginning; what is there already stays as it is.

    Raises:
        ValueError: no spool; the run is being trained; or the store does not answer (everything is kept).
    """
    spool = _spool_of(run)
    options = ["--once", *(["--again"] if again else [])]
    with (spool / "sender.log").open("ab") as log:
        done = subprocess.run(_command(spool, *options), env=_environment(), stdout=subprocess.PIPE, stderr=log)
    lines = done.stdout.decode().splitlines()
    if done.returncode or not lines:
        raise ValueError(f"the sender process ended with code {done.returncode}; see {spool / 'sender.log'}")
    answer = json.loads(lines[-1])
    if answer["problem"]:
        raise ValueError(answer["problem"])
    return Delivery(answer["uri"], answer["run_id"], answer["sent"], answer["refused"])


# --- said of a run afterwards -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Addition:
    """What `add` did. spooled: new events; 0 when everything was there before. problem: why they wait in the spool."""

    spooled: int
    run_id: str | None
    uri: str | None
    problem: str | None


def add(
    run: str | Path,
    metrics: Mapping[str, float],
    images: int,
    *,
    pictures: Mapping[str, bytes] | None = None,
    files: Sequence[str | Path] = (),
) -> Addition | None:
    """Add what was found out about a run to its MLflow run: delivered now, or later by its trainer or `fader sync`.

    What was added before is not added again: metrics with the same values at the same images seen, pictures and files
    that have not changed since. The run's status stays, and no point counts as superseded.

    Args:
        run: the run's folder.
        metrics: numbers at `images` seen.
        pictures: PNG bytes by name.
        files: files in the run's folder, kept in MLflow under the folder they have there (RUN/report/a as report/a).

    Returns:
        None for a run that is not tracked.

    Raises:
        ValueError: a file lies outside the run's folder.
    """
    folder = Path(run).resolve()
    spool = folder / "spool"
    if not (spool / "main.jsonl").is_file():
        return None
    events: list[dict[str, Any]] = [{"kind": "metrics", "metrics": _numbers(metrics)}] if metrics else []
    for name, png in (pictures or {}).items():
        events.append({"kind": "picture", "name": name, "file": _keep_picture(spool, name, images, png)})
    for file in map(os.path.abspath, files):
        path = Path(file).resolve()
        if not path.is_relative_to(folder):
            raise ValueError(f"{file} is not in the run's folder {folder}: only what stays with the run can be added")
        place = "/".join(path.relative_to(folder).parts[:-1])
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        events.append({"kind": "artifact", "path": str(path), "folder": place, "digest": content})
    later = spool / "later.jsonl"
    there = {_mark(event): event for event, _ in _events(later) if event} if later.is_file() else {}
    now = int(time.time() * 1000)
    new = [event | {"step": int(images), "time": now} for event in events]
    new = [event for event in new if _content(there.get(_mark(event), {})) != _content(event)]
    log = _Log(later)
    log.append(b"".join(json.dumps(event).encode() + b"\n" for event in new), sync=True)
    log.close()
    if not undelivered(run):
        return Addition(len(new), run_id_of(run), _State.read(spool).uri, None)
    if _is_locked(spool):
        why = "the run's trainer is at work and delivers it"
        return Addition(len(new), run_id_of(run), _State.read(spool).uri, why)
    try:
        delivery = sync(run)
    except ValueError as error:
        return Addition(len(new), run_id_of(run), _State.read(spool).uri, str(error))
    return Addition(len(new), delivery.run_id, delivery.uri, None)


def _mark(event: Mapping[str, Any]) -> str:
    """What an event is about: a newer one about the same takes its place."""
    if event["kind"] == "artifact":
        return json.dumps(["artifact", event["path"]])
    about = sorted(event["metrics"]) if event["kind"] == "metrics" else event["name"]
    return json.dumps([event["kind"], event["step"], about])


def _content(event: Mapping[str, Any]) -> str:
    """What an event says, without the time at which it is said; a file says the same at every step."""
    left_out = {"time", "step"} if event.get("kind") == "artifact" else {"time"}
    return json.dumps({key: value for key, value in event.items() if key not in left_out}, sort_keys=True)


def _is_locked(spool: Path) -> bool:
    """Whether a sender is at work on a spool."""
    handle = os.open(spool / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False


@dataclass(frozen=True)
class Stored:
    """A run as MLflow holds it: the newest value of each metric."""

    run_id: str
    name: str
    params: dict[str, str]
    metrics: dict[str, float]


def stored(run_id: str) -> Stored:
    """Read a run back from the store in use (MLFLOW_TRACKING_URI, else MLflow's default).

    Raises:
        ValueError: the store does not answer, or has no such run.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        found = mlflow.MlflowClient().get_run(run_id)
    except MlflowException as error:
        where = without_password(mlflow.get_tracking_uri())
        raise ValueError(f"{run_id} is neither a run's folder nor a run in {where} ({reason(error)})") from None
    name = found.info.run_name or run_id
    return Stored(run_id, name, dict(found.data.params), {key: float(v) for key, v in found.data.metrics.items()})


class _Sender:
    """Delivers a spool to one MLflow store, in order, from where the store stands."""

    def __init__(self, spool: Path) -> None:
        import mlflow  # here: the import takes seconds, and only the sender process pays them
        from mlflow.exceptions import MlflowException

        self.spool = spool
        self.state = _State.read(spool, default_uri=_named(mlflow.get_tracking_uri()))
        self.error = MlflowException
        uri = os.environ.get("MLFLOW_TRACKING_URI") or self.state.uri
        mlflow.set_tracking_uri(uri)
        self._client = mlflow.MlflowClient(uri)
        self._stuck: tuple[str, int] = ("", 0)
        self.sent = 0
        self.absent = False

    def deliver(self) -> None:
        """Everything the spool holds now. Raises whatever MLflow raises; what was delivered before stays noted."""
        if self.state.run_id is None:
            begin = next((e for e, _ in _events(self.spool / "main.jsonl") if e and e["kind"] == "start"), None)
            if begin is None:
                return
            self.state.run_id = self._find_or_create(begin)
            self.state.save()
        try:
            for path in _files(self.spool):
                self._deliver_file(path)
        except self.error as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST" and not self._run_exists():
                logger.warning("the store no longer has run %s: everything is sent to a new one", self.state.run_id)
                self.state.forget()
            raise
        self.state.problem = None
        self.state.save()

    def _find_or_create(self, begin: dict[str, Any]) -> str:
        """The run of this spool: the one named, else the one tagged with the spool's key, else a new one."""
        client = self._client
        if begin["run_id"]:
            with contextlib.suppress(self.error):
                return client.get_run(begin["run_id"]).info.run_id
        experiment = client.get_experiment_by_name(begin["experiment"])
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(begin["experiment"])
        # A server may have created the run and died before it said so: the key finds that one.
        found = client.search_runs([experiment_id], f"tags.`fader.key` = '{begin['key']}'", max_results=1)
        if found:
            return found[0].info.run_id
        tags = {"fader.key": begin["key"], "mlflow.source.name": "fader train", "mlflow.source.type": "LOCAL"}
        with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
            tags["mlflow.user"] = getpass.getuser()
        return client.create_run(experiment_id, begin["time"], tags, begin["name"]).info.run_id

    def answers(self) -> bool:
        try:
            self._client.search_experiments(max_results=1)
        except self.error:
            return False
        return True

    def _run_exists(self) -> bool:
        try:
            self._client.get_run(self.state.run_id)
        except self.error as error:
            return error.error_code != "RESOURCE_DOES_NOT_EXIST"
        return True

    def _deliver_file(self, path: Path) -> None:
        waiting: list[dict[str, Any]] = []
        number = 0
        behind = start = self.state.offsets.get(path.name, 0)
        for event, end in _events(path, start):
            if event is None:
                logger.warning("%s: the line before byte %d is broken and left out", path.name, end)
            metrics = event["metrics"] if event and event["kind"] == "metrics" else None
            if waiting and (metrics is None or number + len(metrics) + 1 > _MAX_METRICS):
                self._deliver_metrics(path, waiting, behind)
                waiting, number = [], 0
            if metrics is not None:
                waiting.append(event)
                number += len(metrics) + 1
            elif event is not None:
                self._attempt(path, event)
                self._note(path, end, 1)
            behind = end
        if waiting or behind != start:
            self._deliver_metrics(path, waiting, behind)

    def _note(self, path: Path, offset: int, events: int) -> None:
        self.state.offsets[path.name] = offset
        self.sent += events
        self.state.save()

    def _deliver_metrics(self, path: Path, events: list[dict[str, Any]], end: int) -> None:
        try:
            self._log_metrics(events)
        except self.error as error:
            if error.error_code not in _REFUSALS:
                raise
            for event in events:  # one of them is the reason: find it and let the others through
                self._attempt(path, event)
        self._note(path, end, len(events))

    def _attempt(self, path: Path, event: dict[str, Any]) -> None:
        """Deliver one event; leave it out, with a word in the log, when the store will never take it.

        An error that is no clear refusal is tried again by whoever called; after five times at the same event, while
        the store answers otherwise, it counts as one: an artifact store without rights must not hold up the metrics.
        """
        try:
            getattr(self, f"_send_{event['kind']}")(event)
        except Exception as error:
            if not isinstance(error, FileNotFoundError) and getattr(error, "error_code", None) not in _REFUSALS:
                if reason(error) in _ABSENT.values() or not self.answers():
                    raise
                here = f"{path.name} {event['time']} {event['kind']}"
                self._stuck = (here, self._stuck[1] + 1 if self._stuck[0] == here else 1)
                if self._stuck[1] < 5:
                    raise
            logger.warning("refused: %s of step %s: %s", event["kind"], event["step"], reason(error))
            self.state.refused += 1

    def _log_metrics(self, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        rows = []
        for event in events:
            values = event["metrics"] | ({"run/updates": event["updates"]} if "updates" in event else {})
            rows += [Metric(_safe(name), value, event["time"], event["step"]) for name, value in values.items()]
        for first in range(0, len(rows), _MAX_METRICS):
            self._client.log_batch(self.state.run_id, metrics=rows[first : first + _MAX_METRICS])

    def _send_metrics(self, event: dict[str, Any]) -> None:
        self._log_metrics([event])

    def _send_start(self, event: dict[str, Any]) -> None:
        self._client.update_run(self.state.run_id, status="RUNNING")
        self._client.log_metric(self.state.run_id, "run/attempt", event["attempt"], event["time"], event["step"])
        self._send_rewound(event | {"why": "resumed from a checkpoint"})

    def _send_rewound(self, event: dict[str, Any]) -> None:
        if event["from"] > event["step"]:
            about = {"to_images": event["step"], "from_images": event["from"], "why": event["why"]}
            self._client.set_tag(self.state.run_id, f"rewound.{event['time']}", json.dumps(about))

    def _send_params(self, event: dict[str, Any]) -> None:
        from mlflow.entities import Param

        there = self._client.get_run(self.state.run_id).data.params
        new = []
        for key, value in event["params"].items():
            key, value = _safe(key), _cut(value, _MAX_PARAM_CHARACTERS)
            if key not in there:
                new.append(Param(key, value))
            elif there[key] != value:  # MLflow lets no parameter change
                about = _cut(f"{there[key]} -> {value} at {event['step']} images", _MAX_TAG_CHARACTERS)
                self._client.set_tag(self.state.run_id, f"changed.{key}", about)
        for first in range(0, len(new), _MAX_PARAMS):
            self._client.log_batch(self.state.run_id, params=new[first : first + _MAX_PARAMS])

    def _send_tags(self, event: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = {_safe(key): _cut(value, _MAX_TAG_CHARACTERS) for key, value in event["tags"].items()}
        if "commit" in tags:
            tags["mlflow.source.git.commit"] = tags["commit"]
        items = [RunTag(key, value) for key, value in tags.items()]
        for first in range(0, len(items), _MAX_PARAMS):
            self._client.log_batch(self.state.run_id, tags=items[first : first + _MAX_PARAMS])

    def _send_picture(self, event: dict[str, Any]) -> None:
        """As MLflow's `log_image` stores it, so that its page shows the steps, under a name made from the content."""
        import tempfile

        from PIL import Image

        source = self.spool / event["file"]
        name = _safe(event["name"]).replace("/", "~")
        mark = hashlib.sha256(source.read_bytes()).hexdigest()[:32]
        stem = f"{name}+step+{event['step']}+timestamp+{event['time']}+{uuid.UUID(mark)}"
        with tempfile.TemporaryDirectory() as folder:
            full, small = Path(folder) / f"{stem}.png", Path(folder) / f"{stem}+compressed.webp"
            full.write_bytes(source.read_bytes())
            with Image.open(full) as image:
                image.thumbnail((256, 256))
                image.save(small)
            for path in (full, small):
                self._client.log_artifact(self.state.run_id, str(path), "images")
        self._client.set_tag(self.state.run_id, "mlflow.loggedImages", True)

    def _send_artifact(self, event: dict[str, Any]) -> None:
        self._client.log_artifact(self.state.run_id, event["path"], event.get("folder") or None)

    def _send_finish(self, event: dict[str, Any]) -> None:
        self._client.set_terminated(self.state.run_id, event["status"], event["time"])

    def killed(self) -> None:
        """Say that the trainer ended without a word."""
        if self.state.run_id is not None:
            last = _last(self.spool / "main.jsonl")
            if last is not None and last["kind"] != "finish":
                self._client.set_terminated(self.state.run_id, "KILLED", last["time"])


_ABSENT = {  # signs, in an error's text, of a server that is not there, and what they mean
    "Connection refused": "connection refused",
    "Connection aborted": "connection broken off",
    "timed out": "no answer in time",
    "Name or service not known": "no such host",
    "Temporary failure in name resolution": "no such host",
}
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def reason(error: BaseException) -> str:
    """Why MLflow did not take something, in a few words: its own text for a dead server is 600 characters long."""
    text = str(error)
    for sign, words in _ABSENT.items():
        if sign in text:
            return words
    lines = text.strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def _sample(spool: Path, node: str | None, stop: threading.Event) -> None:
    """Append the machine's figures to the spool every few seconds, under the names MLflow's own monitor uses."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError) as error:
        logger.info("no GPU figures: %s", error)
    prefix = "system/" if node is None else f"system/{_safe(node)}/"
    log = _Log(spool / f"system{'' if node is None else '-' + _safe(node)}.jsonl")
    monitors[0].collect_metrics()  # the first reading of a processor's use counts from nothing
    monitors[0].clear_metrics()
    wait = 1.0  # a short run gets a sample, too
    while not stop.wait(wait):
        wait, values = SAMPLE_SECONDS, {}
        for monitor in monitors:
            monitor.collect_metrics()
            values |= {prefix + name: value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        step = (_last(spool / "main.jsonl") or {}).get("step", 0)
        event = {"kind": "metrics", "time": int(time.time() * 1000), "step": step, "metrics": values}
        try:
            log.append(json.dumps(event).encode() + b"\n")
        except OSError as error:
            logger.warning("system metrics are not written: %s", error)
    log.close()


def _lock(spool: Path, give_up: threading.Event, patience: float = 0.0) -> int | None:
    """Hold the spool's lock until the handle is closed or the process ends; None `patience` seconds after `give_up`."""
    handle = os.open(spool / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    last = math.inf
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if not give_up.wait(POLL_SECONDS):
                continue
            last = min(last, time.monotonic() + patience)
            if time.monotonic() >= last:
                os.close(handle)
                return None
            time.sleep(POLL_SECONDS)
        except OSError as error:  # a file system without locks: two senders would only do the same work twice
            logger.warning("%s cannot be locked: %s", spool, error)
            return handle


def _serve(spool: Path, parent: int, node: str | None, sample_only: bool) -> None:
    """The sender's life: sample, deliver, and go when the run is finished or its trainer is gone."""
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, *(() if sample_only else (signal.SIGTERM,))):
        signal.signal(name, signal.SIG_IGN)  # Slurm signals every process of a step; this one leaves with its parent
    over, stop_sampling = threading.Event(), threading.Event()

    def ended() -> bool:
        last = None if sample_only else _last(spool / "main.jsonl")
        return os.getppid() != parent or (last is not None and last["kind"] == "finish")

    def look() -> None:
        while not ended():
            time.sleep(POLL_SECONDS)
        over.set()

    threading.Thread(target=look, daemon=True).start()
    sampler = threading.Thread(target=_sample, args=(spool, node, stop_sampling), daemon=True)
    sampler.start()
    if sample_only:
        over.wait()
        return
    # A short attempt may have finished while the sender of the one before it is still on its way out.
    if _lock(spool, give_up=over, patience=LOCK_PATIENCE_SECONDS) is None:
        return
    sender: _Sender | None = None
    wait = POLL_SECONDS
    while not over.is_set():
        sender, problem = _try_to_deliver(spool, sender)
        wait = min(wait * 2, BACKOFF_SECONDS) if problem else POLL_SECONDS
        over.wait(wait)
    stop_sampling.set()
    sampler.join(5)
    _deliver_the_rest(spool, sender)


def _try_to_deliver(spool: Path, sender: _Sender | None) -> tuple[_Sender | None, str | None]:
    """One attempt. Whatever goes wrong becomes the state's `problem`, which trainer and `sync` report."""
    try:
        sender = sender or _Sender(spool)
        sender.deliver()
        return sender, None
    except Exception as error:  # MLflow, its stores and their drivers raise what they like; nothing of it may end this
        state = sender.state if sender else _State.read(spool)
        if sender:
            sender.absent = reason(error) in _ABSENT.values()
        if state.problem is None:
            logger.exception("not delivered")
        state.problem = f"MLflow at {state.uri} takes no points now ({reason(error)})"
        state.save()
        return sender, state.problem


def _deliver_the_rest(spool: Path, sender: _Sender | None) -> tuple[_Sender | None, str | None]:
    """The last attempt, repeated only while the store answers: an event it never takes must not hold up the others."""
    for _ in range(7):
        sender, problem = _try_to_deliver(spool, sender)
        if problem is None or sender is None or sender.absent:
            break
        time.sleep(POLL_SECONDS)
    if problem is None and sender is not None and _trainer_is_gone(spool):
        with contextlib.suppress(sender.error):
            sender.killed()
    return sender, problem


def _trainer_is_gone(spool: Path) -> bool:
    """Whether the process that began the last attempt ran on this machine and runs no more."""
    begin: dict[str, Any] = {}
    for event, _ in _events(spool / "main.jsonl"):
        if event is not None and event["kind"] == "start":
            begin = event
    if begin.get("host") != socket.gethostname():
        return False
    try:
        os.kill(begin["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _deliver_once(spool: Path, again: bool) -> dict[str, Any]:
    """What `sync` asks its child process to do."""
    give_up = threading.Event()
    timer = threading.Timer(15, give_up.set)
    timer.daemon = True
    timer.start()
    lock = _lock(spool, give_up)
    timer.cancel()
    if lock is None:
        return {"problem": f"another process delivers {spool} now: the run's trainer, or a second 'fader sync'"}
    try:
        if again:
            state = _State.read(spool)
            state.offsets, state.refused = {}, 0
            state.save()
        sender, problem = _deliver_the_rest(spool, None)
    finally:
        os.close(lock)
    if problem or sender is None or sender.state.run_id is None:
        left = f"everything is kept in {spool}; set MLFLOW_TRACKING_URI or start the server, and run 'fader sync' again"
        return {"problem": f"{problem or 'the spool names no run'}; {left}"}
    state = sender.state
    return {"problem": None, "uri": state.uri, "run_id": state.run_id, "sent": sender.sent, "refused": state.refused}


def main() -> None:
    """`python -m pipeline.tracking SPOOL`: the sender process; not a command for people."""
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("spool", type=Path)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--node")
    parser.add_argument("--sample-only", action="store_true")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if given.once:
        print(json.dumps(_deliver_once(given.spool, given.again)))
    else:
        _serve(given.spool, given.parent, given.node, given.sample_only)


if __name__ == "__main__":
    main()
