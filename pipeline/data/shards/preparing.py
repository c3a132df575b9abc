"""A shard set from a data set: by one command, or by tasks on several machines and a finisher.

Every task reads the same source and deals the same records to the same shards; task I of N writes every N-th of them.
OUT/.prepare holds a note on each finished shard, so whoever was killed goes on where it stopped. The finisher holds every
shard against its note, names the tasks whose shards are missing, and writes what no task can know: the manifest and
dataset.json. Every byte is the one that a single command writes.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.datasets import SPLITS, Dataset
from pipeline.data.datasets.workers import Progress, silent, spread
from pipeline.data.shards.files import DESCRIPTION, FIXED_COLUMNS, FORMAT, MANIFEST, ORIENTATION, WORK
from pipeline.data.shards.manifest import data_digest, manifest_of, untaught
from pipeline.data.shards.reading import ShardSet
from pipeline.data.shards.writing import ShardJob, Written, finished_shard, write_shard
from pipeline.files import digest_of, flush, replacing, write_json, write_whole
from pipeline.images import Check
from pipeline.ownership import owned

_FLUSHING_THREADS = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How a set is written: shard_records a tar; workers: processes, None one a core; skip_bad: leave out bad pictures, and
    list them; check: how each is proven to be sound (see `images.check`; the set is the same); progress(done, in all)."""

    shard_records: int = 4096
    workers: int | None = None
    skip_bad: bool = False
    check: Check = "full"
    progress: Progress = silent

    def __post_init__(self) -> None:
        if self.shard_records < 1 or (self.workers is not None and self.workers < 1):
            raise ValueError(f"shard_records {self.shard_records} and workers {self.workers} must be at least 1")


def prepare(dataset: Dataset, out: Path | str, **settings: Any) -> ShardSet:
    """Write a shard set, or go on with one that was interrupted; settings: see `Settings`. Every byte is the same however
    often that happens. Raises ValueError: the folder is another's or in use, or a picture is bad."""
    how = Settings(**settings)
    return _complete(dataset, Path(out), how, lambda jobs: _write(jobs, how))


def finish(dataset: Dataset, out: Path | str, **settings: Any) -> ShardSet:
    """Make one set of what all tasks wrote. Raises ValueError: as `prepare`; a task still runs; or one has not finished
    or has failed: it is named, and nothing is written."""
    out, how = Path(out), Settings(**settings)
    note = out / WORK / "tasks"

    def collect(jobs: list[ShardJob]) -> list[Written]:
        results = spread(partial(finished_shard, short=how.skip_bad), jobs, how.workers, len(dataset), how.progress)
        tasks, missing = int(note.read_text()), dict[int, list[str]]()
        for number, (job, written) in enumerate(zip(jobs, results)):
            if written is None:
                missing.setdefault(number % tasks, []).append(job.name)
        if missing:
            named = "; ".join(f"task {task} of {tasks}: {', '.join(names[:3])}" for task, names in sorted(missing.items()))
            raise ValueError(
                f"{out} lacks {sum(map(len, missing.values()))} of {len(jobs)} shards, which did not get finished, are damaged, "
                f"or lack bad records (--skip-bad allows that here, too): {named}; run those tasks again, then the finisher"
            )
        return results

    if not note.is_file() and not (out / DESCRIPTION).is_file():
        raise ValueError(f"{out} holds nothing that a task wrote; run the tasks first")
    return _complete(dataset, out, how, collect)


def write_part(dataset: Dataset, out: Path | str, task: int, tasks: int, **settings: Any) -> list[str]:
    """Write the shards of task 0, 1, … of `tasks`, or those that an interrupted one left; return their names. Tasks may run
    at the same time. Raises ValueError: as `prepare`; the task runs already; or others were told another number of tasks."""
    out, how = Path(out), Settings(**settings)
    if not 0 <= task < tasks:
        raise ValueError(f"task {task} of {tasks}: tasks are counted from 0 to {tasks - 1}")
    source = _source_digest(dataset, how)
    mine = _jobs_of(dataset, out, how)[task::tasks]
    if not (out / DESCRIPTION).is_file():
        _claim(out)
        work, who = out / WORK, f"{out} as task {task} of {tasks}"
        with owned(work / "lock", str(out), shared=True), owned(work / f"task-{task}.lock", who):
            _finished_set(out, source)
            _agree_on_tasks(out, tasks)
            _write(mine, how)
    else:
        _finished_set(out, source)
    return [job.name for job in mine]


def _complete(dataset: Dataset, out: Path, how: Settings, write: Callable[[list[ShardJob]], list[Written]]) -> ShardSet:
    """Describe the shards that `write` gives, unless the set is finished already."""
    source = _source_digest(dataset, how)
    _claim(out)
    with owned(out / WORK / "lock", str(out)):
        finished = _finished_set(out, source)
        if finished is None:
            jobs = _jobs_of(dataset, out, how)
            finished = _describe_set(dataset, out, source, how.shard_records, jobs, write(jobs))
        shutil.rmtree(out / WORK)
    return finished


def _write(jobs: list[ShardJob], how: Settings) -> list[Written]:
    """Write shards, or take those that an earlier run finished; what it left half written goes."""
    names = {job.name for job in jobs}
    for stale in jobs[0].out.glob(f"{WORK}/*.part") if jobs else ():
        if f"{stale.name.partition('.tar')[0]}.tar" in names:
            stale.unlink()
    records, few = sum(len(job.data) for job in jobs), 50_000 if how.check == "full" else 10_000
    return spread(write_shard, jobs, how.workers, records, how.progress, few)


def _jobs_of(dataset: Dataset, out: Path, how: Settings) -> list[ShardJob]:
    """Deal records to shards, inside each split in the order of a digest of their keys, which is a fixed shuffle."""
    order = [hashlib.blake2b(key.encode(), digest_size=16).digest() for key in dataset.keys]
    jobs = []
    for split in SPLITS:
        rows = sorted((row for row, s in enumerate(dataset.splits) if s == split), key=order.__getitem__)
        for number, start in enumerate(range(0, len(rows), how.shard_records)):
            part = dataset.part(rows[start : start + how.shard_records])
            jobs.append(ShardJob(out, f"{split}-{number:06d}.tar", part, how.skip_bad, how.check))
    return jobs


def _source_digest(dataset: Dataset, how: Settings) -> str:
    if not len(dataset):
        raise ValueError(f"{dataset.name}: not one record to write; is the source empty?")
    reserved = [e["name"] for e in dataset.attribute_list if e["name"] in (*FIXED_COLUMNS, ORIENTATION)]
    if reserved:
        raise ValueError(f"attribute {reserved[0]!r} is called like a column of the manifest; rename it")
    return hashlib.sha256(f"{FORMAT} {dataset.digest()} {how.shard_records}".encode()).hexdigest()


def _claim(out: Path) -> None:
    """Make the folder, or hold that what lies in it is a set."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a folder is needed")
    ours = (out / WORK).is_dir() or (out / DESCRIPTION).is_file()
    foreign = [] if ours or not out.exists() else [p.name for p in out.iterdir() if p.is_file()]
    if foreign:
        raise ValueError(f"{out} holds {foreign[0]} and no shard set; choose a folder that is absent or empty")
    (out / WORK).mkdir(parents=True, exist_ok=True)


def _finished_set(out: Path, source: str) -> ShardSet | None:
    """The finished set that lies in `out`, when it is of this source; None when there is none yet."""
    started = out / WORK / "source"
    other = "of another source or shard size; choose another folder, or remove it first"
    if (out / DESCRIPTION).exists():
        finished = ShardSet.open(out)
        if finished.info.get("source_digest") != source:
            shutil.rmtree(out / WORK, ignore_errors=True)
            raise ValueError(f"{out} already holds a finished set {other}")
        logger.info("%s is already complete; nothing to do", out)
        return finished
    if started.exists() and started.read_text() != source:
        raise ValueError(f"{out} holds an unfinished set {other}")
    if not started.exists():
        write_whole(started, source)
    return None


def _agree_on_tasks(out: Path, tasks: int) -> None:
    """Note the number of tasks, or hold it against the note."""
    note = out / WORK / "tasks"
    if not note.exists():
        write_whole(note, str(tasks))
    before = int(note.read_text())
    if before != tasks:
        raise ValueError(
            f"{out} is being written by {before} tasks, not by {tasks}: give all of them the same number, "
            "or remove the folder and start again"
        )


def _describe_set(
    dataset: Dataset, out: Path, source: str, shard_records: int, jobs: list[ShardJob], results: list[Written]
) -> ShardSet:
    """Write the manifest and dataset.json of shards that are written, each job's result beside it."""
    left_out = [*dataset.left_out, *(entry for written in results for entry in written.left_out)]
    shards = [(job, written) for job, written in zip(jobs, results, strict=True) if written.columns["record"]]
    for name in {job.name for job in jobs} - {job.name for job, _ in shards}:
        (out / name).unlink()
    if not shards:
        raise ValueError(f"{dataset.name}: every record is bad, beginning with {left_out[0].reason}")

    import pyarrow.parquet as pq

    with ThreadPoolExecutor(_FLUSHING_THREADS) as pool:
        list(pool.map(flush, [out / job.name for job, _ in shards]))
    columns, all_labels = _columns(shards)
    table, splits, start = manifest_of(dataset.attribute_list, columns, all_labels), {}, 0
    for split in SPLITS:
        files = [
            {"file": job.name, "records": len(written.columns["record"]), "size": written.size, "digest": written.digest}
            for job, written in shards
            if job.name.startswith(split)
        ]
        labels = all_labels[start : start + sum(file["records"] for file in files)]
        start += len(labels)
        for words in untaught(dataset.attribute_list, labels) if split == "train" and len(labels) else ():
            logger.warning("train: %s: nothing can be learnt of it", words)
        splits[split] = {"records": len(labels), "labels": _counts(dataset.attribute_list, labels), "shards": files}
    with replacing(out / MANIFEST, out / WORK) as file:
        pq.write_table(table, file)
    info = {
        "format": FORMAT,
        "name": dataset.name,
        "source": dataset.source,
        "source_digest": source,
        "digest": data_digest(dataset.attribute_list, table),
        "attributes": [{**entry, "k": len(entry["categories"]) or 2} for entry in dataset.attribute_list],
        "shard_records": shard_records,
        "splits": splits,
        "manifest": {"file": MANIFEST, "size": (out / MANIFEST).stat().st_size, "digest": digest_of(out / MANIFEST)},
        "left_out": [entry._asdict() for entry in left_out],
    }
    write_json(out / DESCRIPTION, info, work=out / WORK)
    return ShardSet.open(out)


def _columns(shards: list[tuple[ShardJob, Written]]) -> tuple[dict[str, list[Any]], np.ndarray]:
    """The columns of the manifest, and labels [n, A], of all records in the order of the tars."""
    columns: dict[str, list[Any]] = {name: [] for name in (*FIXED_COLUMNS, ORIENTATION)}
    labels = []
    for job, written in shards:
        records = written.columns["record"]
        columns["key"] += [job.data.keys[record] for record in records]
        columns["split"] += [job.name.partition("-")[0]] * len(records)
        columns["shard"] += [job.name] * len(records)
        for name in columns.keys() & written.columns.keys():
            columns[name] += written.columns[name]
        labels.append(job.data.labels[records])
    return columns, np.concatenate(labels)


def _counts(attribute_list: list[dict[str, Any]], labels: np.ndarray) -> dict[str, dict[str, float]]:
    """How many records of a split hold each value of each attribute; of a continuous one the mean."""
    counts: dict[str, dict[str, float]] = {}
    for entry, column in zip(attribute_list, labels.T):
        known = column[column >= 0]
        if entry["kind"] == "continuous":
            counts[entry["name"]] = {"mean": float(known.mean()) if len(known) else 0.0}
        else:
            values = entry["categories"] or ["0", "1"]
            counts[entry["name"]] = {value: int((known == v).sum()) for v, value in enumerate(values)}
        if len(known) < len(column):
            counts[entry["name"]]["unknown"] = len(column) - len(known)
    return counts
