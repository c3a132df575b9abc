"""The sender process: it samples the machine and delivers a spool until its run is finished or its trainer is gone.

It is started as `python -m pipeline.tracking.process SPOOL OPTIONS`, and is no command for people.
"""

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from pipeline.tracking.address import WithoutPasswords
from pipeline.tracking.sender import Deleted, Sender, is_absent, reason
from pipeline.tracking.spool import Log, State, last_event, read_events, safe

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
BACKOFF_SECONDS = 10.0
SAMPLE_SECONDS = 10.0
LOCK_PATIENCE_SECONDS, SYNC_PATIENCE_SECONDS = 20.0, 15.0


def take_lock(spool: Path, give_up: Callable[[], bool]) -> int | None:
    """Hold the spool's lock until the handle is closed or the process ends; None when it is taken and `give_up` says so."""
    handle = os.open(spool / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if give_up():
                os.close(handle)
                return None
            time.sleep(POLL_SECONDS)
        except OSError as error:  # a file system without locks: two senders would only do the same work twice
            logger.warning("%s cannot be locked: %s", spool, error)
            return handle


def serve(spool: Path, parent: int, node: str | None, sample_only: bool) -> None:
    """Sample and deliver until the run is finished or its trainer is gone."""
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, *(() if sample_only else (signal.SIGTERM,))):
        signal.signal(name, signal.SIG_IGN)  # Slurm signals every process of a step; this one leaves with its parent
    over, too_late, stop_sampling = threading.Event(), threading.Event(), threading.Event()

    def ended() -> bool:
        last = None if sample_only else last_event(spool / "main.jsonl")
        return os.getppid() != parent or (last is not None and last["kind"] == "finish")

    def look() -> None:
        while not ended():
            time.sleep(POLL_SECONDS)
        over.set()
        time.sleep(LOCK_PATIENCE_SECONDS)
        too_late.set()

    threading.Thread(target=look, daemon=True).start()
    sampler = threading.Thread(target=sample, args=(spool, node, stop_sampling), daemon=True)
    sampler.start()
    if sample_only:
        over.wait()
        return
    # A short attempt may have finished while the sender of the one before it is still on its way out.
    if take_lock(spool, too_late.is_set) is None:
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
    """Try once. Whatever goes wrong becomes the state's `problem`, which trainer and `sync` report."""
    try:
        sender = sender or Sender(spool)
        sender.deliver()
        sender.failure = None
        return sender, None
    except Exception as error:  # MLflow, its stores and their drivers raise what they like; nothing of it may end this
        state = sender.state if sender else State.read(spool)
        if sender:
            sender.failure = error
        if state.problem is None:
            logger.exception("not delivered")
        state.problem = f"MLflow at {state.uri} takes no points now ({reason(error)})"
        state.save()
        return sender, state.problem


def _deliver_the_rest(spool: Path, sender: Sender | None) -> tuple[Sender | None, str | None]:
    """Try for the last time, again only while the store answers, so that an event it never takes holds up no others."""
    for _ in range(7):
        sender, problem = try_to_deliver(spool, sender)
        if problem is None or sender is None or is_absent(sender.failure) or isinstance(sender.failure, Deleted):
            break
        time.sleep(POLL_SECONDS)
    if problem is None and sender is not None and _trainer_is_gone(spool):
        with contextlib.suppress(sender.error):
            sender.killed()
    return sender, problem


def _trainer_is_gone(spool: Path) -> bool:
    """Return whether the process that began the last attempt ran on this machine and runs no more."""
    starts = [event for event, _ in read_events(spool / "main.jsonl") if event and event["kind"] == "start"]
    return bool(starts) and starts[-1]["host"] == socket.gethostname() and not psutil.pid_exists(starts[-1]["pid"])


def deliver_once(spool: Path, again: bool) -> dict[str, Any]:
    """Do what `sync` asks its child process for, and return the answer."""
    deadline = time.monotonic() + SYNC_PATIENCE_SECONDS
    lock = take_lock(spool, lambda: time.monotonic() > deadline)
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
        absent = sender is not None and is_absent(sender.failure)
        helps = "start the server, or name another by MLFLOW_TRACKING_URI, and" if absent else "then"
        left = f"everything is kept in {spool}; {helps} run 'fader sync' again"
        return {"problem": f"{problem or 'the spool names no run'}; {left}"}
    state = sender.state
    return {"problem": None, "uri": state.uri, "run_id": state.run_id, "sent": sender.sent, "refused": state.refused}


def sample(spool: Path, node: str | None, stop: threading.Event) -> None:
    """Append the machine's figures to the spool every few seconds, under the names that MLflow's own monitor uses."""
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


def main() -> None:
    """Do what `delivery` asks this process for: its options, as JSON, are the arguments of `serve` or of `deliver_once`."""
    spool, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    sys.stderr = WithoutPasswords(sys.stderr)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if "again" in options:
        print(json.dumps(deliver_once(spool, **options)))
    else:
        serve(spool, **options)


if __name__ == "__main__":
    main()
