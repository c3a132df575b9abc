"""The sender process, from inside: it samples the machine, reads the spool and delivers it to MLflow."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import hashlib
import json
import logging
import math
import os
import signal
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from pipeline.tracking.spool import Log, State, last_event, named, read_events, safe, spool_files

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
BACKOFF_SECONDS = 10.0
SAMPLE_SECONDS = 10.0  # system metrics
LOCK_PATIENCE_SECONDS = 20.0

_MAX_METRICS, _MAX_PARAMS, _MAX_PARAM_CHARACTERS, _MAX_TAG_CHARACTERS = 1000, 100, 6000, 5000


class Sender:
    """Delivers a spool to one MLflow store, in order, from where the store stands."""

    def __init__(self, spool: Path) -> None:
        import mlflow  # here: the import takes seconds, and only the sender process pays them
        from mlflow.exceptions import MlflowException

        self.spool = spool
        self.state = State.read(spool, default_uri=named(mlflow.get_tracking_uri()))
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
            begin = next((e for e, _ in read_events(self.spool / "main.jsonl") if e and e["kind"] == "start"), None)
            if begin is None:
                return
            self.state.run_id = self._find_or_create(begin)
            self.state.save()
        try:
            for path in spool_files(self.spool):
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
        for event, end in read_events(path, start):
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
            rows += [Metric(safe(name), value, event["time"], event["step"]) for name, value in values.items()]
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
            key, value = safe(key), _cut(value, _MAX_PARAM_CHARACTERS)
            if key not in there:
                new.append(Param(key, value))
            elif there[key] != value:  # MLflow lets no parameter change
                about = _cut(f"{there[key]} -> {value} at {event['step']} images", _MAX_TAG_CHARACTERS)
                self._client.set_tag(self.state.run_id, f"changed.{key}", about)
        for first in range(0, len(new), _MAX_PARAMS):
            self._client.log_batch(self.state.run_id, params=new[first : first + _MAX_PARAMS])

    def _send_tags(self, event: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = {safe(key): _cut(value, _MAX_TAG_CHARACTERS) for key, value in event["tags"].items()}
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
        name = safe(event["name"]).replace("/", "~")
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
            last = last_event(self.spool / "main.jsonl")
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
    prefix = "system/" if node is None else f"system/{safe(node)}/"
    log = Log(spool / f"system{'' if node is None else '-' + safe(node)}.jsonl")
    monitors[0].collect_metrics()  # the first reading of a processor's use counts from nothing
    monitors[0].clear_metrics()
    wait = 1.0  # a short run gets a sample, too
    while not stop.wait(wait):
        wait, values = SAMPLE_SECONDS, {}
        for monitor in monitors:
            monitor.collect_metrics()
            values |= {prefix + name: value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        step = (last_event(spool / "main.jsonl") or {}).get("step", 0)
        event = {"kind": "metrics", "time": int(time.time() * 1000), "step": step, "metrics": values}
        try:
            log.append(json.dumps(event).encode() + b"\n")
        except OSError as error:
            logger.warning("system metrics are not written: %s", error)
    log.close()


def take_lock(spool: Path, give_up: threading.Event, patience: float = 0.0) -> int | None:
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


def serve(spool: Path, parent: int, node: str | None, sample_only: bool) -> None:
    """The sender's life: sample, deliver, and go when the run is finished or its trainer is gone."""
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, *(() if sample_only else (signal.SIGTERM,))):
        signal.signal(name, signal.SIG_IGN)  # Slurm signals every process of a step; this one leaves with its parent
    over, stop_sampling = threading.Event(), threading.Event()

    def ended() -> bool:
        last = None if sample_only else last_event(spool / "main.jsonl")
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
    if take_lock(spool, give_up=over, patience=LOCK_PATIENCE_SECONDS) is None:
        return
    sender: Sender | None = None
    wait = POLL_SECONDS
    while not over.is_set():
        sender, problem = try_to_deliver(spool, sender)
        wait = min(wait * 2, BACKOFF_SECONDS) if problem else POLL_SECONDS
        over.wait(wait)
    stop_sampling.set()
    sampler.join(5)
    _deliver_the_rest(spool, sender)


def try_to_deliver(spool: Path, sender: Sender | None) -> tuple[Sender | None, str | None]:
    """One attempt. Whatever goes wrong becomes the state's `problem`, which trainer and `sync` report."""
    try:
        sender = sender or Sender(spool)
        sender.deliver()
        return sender, None
    except Exception as error:  # MLflow, its stores and their drivers raise what they like; nothing of it may end this
        state = sender.state if sender else State.read(spool)
        if sender:
            sender.absent = reason(error) in _ABSENT.values()
        if state.problem is None:
            logger.exception("not delivered")
        state.problem = f"MLflow at {state.uri} takes no points now ({reason(error)})"
        state.save()
        return sender, state.problem


def _deliver_the_rest(spool: Path, sender: Sender | None) -> tuple[Sender | None, str | None]:
    """The last attempt, repeated only while the store answers: an event it never takes must not hold up the others."""
    for _ in range(7):
        sender, problem = try_to_deliver(spool, sender)
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
    for event, _ in read_events(spool / "main.jsonl"):
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


def deliver_once(spool: Path, again: bool) -> dict[str, Any]:
    """What `sync` asks its child process to do."""
    give_up = threading.Event()
    timer = threading.Timer(15, give_up.set)
    timer.daemon = True
    timer.start()
    lock = take_lock(spool, give_up)
    timer.cancel()
    if lock is None:
        return {"problem": f"another process delivers {spool} now: the run's trainer, or a second 'fader sync'"}
    try:
        if again:
            state = State.read(spool)
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
