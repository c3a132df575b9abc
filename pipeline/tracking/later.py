"""Add to a run what is measured afterwards."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import digest_of
from pipeline.tracking.delivery import sync
from pipeline.tracking.process import take_lock
from pipeline.tracking.spool import Log, State, as_numbers, read_events, run_id_of, undelivered


@dataclass(frozen=True)
class Addition:
    """What `add` did: new events, 0 when everything was there before; and the problem for which they wait in the spool."""

    spooled: int
    run_id: str | None
    uri: str | None
    problem: str | None


def add(
    run: str | Path, metrics: Mapping[str, float], images: int, *, files: Sequence[str | Path] = (),
    tags: Mapping[str, str] | None = None,
) -> Addition | None:
    """Add what was found out about a run to its MLflow run: delivered now, or later by its trainer or `fader sync`.

    What was added before is not added again: metrics with the same values at the same images seen, and files that have
    not changed since. The run's status stays, and no point counts as superseded. tags replace older ones. files: in the
    run's folder, whose place they keep in MLflow (RUN/report/a as report/a). Returns None for a run that is not tracked.
    """
    folder = Path(run).resolve()
    spool = folder / "spool"
    if not (spool / "main.jsonl").is_file():
        return None
    events: list[dict[str, Any]] = [{"kind": "metrics", "metrics": as_numbers(metrics)}] if metrics else []
    events += [{"kind": "tags", "tags": dict(tags)}] if tags else []
    for file in map(os.path.abspath, files):
        path = Path(file).resolve()
        if not path.is_relative_to(folder):
            raise ValueError(f"{file} is not in the run's folder {folder}: only what stays with the run can be added")
        place = "/".join(path.relative_to(folder).parts[:-1])
        inside = str(path.relative_to(folder))
        events.append({"kind": "artifact", "path": inside, "folder": place, "digest": digest_of(path)})
    later = spool / "later.jsonl"
    there = {_mark(event): event for event, _ in read_events(later) if event} if later.is_file() else {}
    now = int(time.time() * 1000)
    new = [event | {"step": int(images), "time": now} for event in events]
    new = [event for event in new if _content(there.get(_mark(event), {})) != _content(event)]
    log = Log(later)
    log.append(b"".join(json.dumps(event).encode() + b"\n" for event in new), sync=True)
    log.close()
    problem = _deliver(run, spool) if undelivered(run) else None
    return Addition(len(new), run_id_of(run), State.read(spool).uri, problem)


def _deliver(run: str | Path, spool: Path) -> str | None:
    """Deliver what a run's spool holds now; return why it has to wait there, if it has to."""
    lock = take_lock(spool, lambda: True)
    if lock is None:
        return "the run's trainer is at work and delivers it"
    os.close(lock)
    try:
        sync(run)
    except ValueError as error:
        return str(error)
    return None


def _mark(event: Mapping[str, Any]) -> str:
    """Return what an event is about; a newer one about the same takes its place."""
    if event["kind"] == "artifact":
        return event["path"]
    if event["kind"] == "tags":
        return json.dumps(["tags", sorted(event["tags"])])
    return json.dumps([event["step"], sorted(event.get("metrics", ()))])


def _content(event: Mapping[str, Any]) -> str:
    """Return what an event says, without the time at which it is said; a file and a tag say the same at every step."""
    left_out = {"time", "step"} if event.get("kind") in ("artifact", "tags") else {"time"}
    return json.dumps({key: value for key, value in event.items() if key not in left_out}, sort_keys=True)
