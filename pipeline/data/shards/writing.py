"""Writing a shard set: records dealt to shards, tars packed by many processes, the manifest and dataset.json last."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline.data.datasets import SPLITS, Dataset, LeftOut
from pipeline.data.datasets.workers import Progress, silent, spread, tick
from pipeline.data.shards.files import (
    BLOCK,
    DESCRIPTION,
    EXTENSIONS,
    FIXED_COLUMNS,
    FORMAT,
    MANIFEST,
    ORIENTATION,
    RECORD,
    WORK,
    header,
    label_members,
    member_json,
    padded,
    sha256,
)
from pipeline.data.shards.manifest import data_digest, untaught
from pipeline.data.shards.reading import ShardSet
from pipeline.files import digest_of, replacing, write_json, write_whole
from pipeline.images import Check, Checked, check
from pipeline.ownership import owned

if TYPE_CHECKING:  # packing processes import this file and need neither torch nor pyarrow
    import pyarrow as pa

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: the records dealt to it, and where it goes."""

    out: Path
    name: str
    names: list[str]
    kinds: list[str]
    keys: list[str]
    locations: list[str]
    labels: np.ndarray
    places: list[str]
    read: Callable[[str], bytes]
    skip_bad: bool
    check: Check = "full"

    @property
    def note(self) -> Path:
        return self.out / WORK / f"{self.name}.json"

    def digest(self) -> str:
        """What decides the shard's content, apart from the pictures."""
        digest = hashlib.sha256(
            json.dumps([FORMAT, self.name, self.names, self.kinds, self.keys, self.locations]).encode()
        )
        digest.update(np.ascontiguousarray(self.labels, "<f4").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Written:
    """A shard as it stands on the disk. rows: (index among the job's records, offset, size, digest, width, height,
    extension, orientation) of every record in it."""

    job: str
    size: int
    digest: str
    rows: list[tuple[int, int, int, str, int, int, str, int]]
    left_out: list[LeftOut]


def _picture(job: ShardJob, i: int) -> tuple[bytes, Checked] | str:
    """Bytes of a record's picture and what is known of them, or what is wrong with it."""
    try:
        data = job.read(job.locations[i])
        checked = check(data, job.check)
    except FileNotFoundError as error:
        return f"picture {job.locations[i]} is missing ({error.filename})"
    except (OSError, ValueError) as error:
        return f"picture {job.locations[i]} cannot be read: {error}"
    if checked.format not in EXTENSIONS:
        return f"picture {job.locations[i]} is {checked.format}; shards hold {', '.join(EXTENSIONS)}"
    return data, checked


def _write_shard(job: ShardJob) -> Written:
    """Write one tar and, when it stands in its place, the note that says so."""
    rows, left_out, offset, digest = [], [], 0, hashlib.sha256()
    with replacing(job.out / job.name, job.out / WORK) as file:
        members = label_members(job.names, job.kinds, job.labels)
        for i, (key, labels) in enumerate(zip(job.keys, members, strict=True)):
            tick()
            picture = _picture(job, i)
            if isinstance(picture, str):
                if not job.skip_bad:
                    raise ValueError(f"{job.places[i]}: {picture}; mend it, or leave such records out with --skip-bad")
                left_out.append(LeftOut(key, f"{job.places[i]}: {picture}"))
                continue
            data, (width, height, orientation, kind) = picture
            extension = EXTENSIONS[kind]
            block = header(f"{key}.{extension}", len(data)) + padded(data) + member_json(key, labels)
            rows.append((i, offset + BLOCK, len(data), sha256(data), width, height, extension, orientation))
            file.write(block)
            digest.update(block)
            offset += len(block)
        end = bytes(2 * BLOCK + -(offset + 2 * BLOCK) % RECORD)
        file.write(end)
        digest.update(end)
    written = Written(job.digest(), offset + len(end), digest.hexdigest(), rows, left_out)
    write_json(job.note, vars(written), work=job.out / WORK)
    return written


def finished_shard(job: ShardJob, short: bool = False) -> Written | None:
    """The shard an earlier run finished, when it is whole and of the same records.

    short: take it also when bad ones were left out of it; otherwise None, so that they are tried again.
    """
    try:
        entries = json.loads(job.note.read_text())
        rows, left_out = [tuple(row) for row in entries["rows"]], [LeftOut(*entry) for entry in entries["left_out"]]
        written = Written(**{**entries, "rows": rows, "left_out": left_out})
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None
    if any(len(row) != 8 for row in rows):  # of a version that did not read which way up a picture is
        return None
    tar = job.out / job.name
    if (left_out and not short) or written.job != job.digest():
        return None
    if not tar.is_file() or tar.stat().st_size != written.size:
        return None
    return written if digest_of(tar) == written.digest else None


def shard(job: ShardJob) -> Written:
    written = finished_shard(job)
    if written is None:
        return _write_shard(job)
    for _ in job.keys:
        tick()
    return written


def each_shard(
    function: Callable[[ShardJob], Result], jobs: list[ShardJob], workers: int | None, progress: Progress
) -> list[Result]:
    """`function` of every job, in the order of the jobs; large ones begin first, so that the last to end is small."""
    order = sorted(range(len(jobs)), key=lambda k: -len(jobs[k].keys))
    total = sum(len(job.keys) for job in jobs)
    results = dict(zip(order, spread(function, [jobs[k] for k in order], workers, total, progress)))
    return [results[k] for k in range(len(jobs))]


def jobs_of(
    dataset: Dataset, out: Path, shard_records: int, skip_bad: bool, check: Check = "full"
) -> list[ShardJob]:
    """Records dealt to shards: inside each split in the order of a digest of their keys, which is a fixed shuffle."""
    names = [entry["name"] for entry in dataset.attribute_list]
    kinds = [entry["kind"] for entry in dataset.attribute_list]
    order = [hashlib.blake2b(key.encode(), digest_size=16).digest() for key in dataset.keys]
    jobs = []
    for split in SPLITS:
        rows = sorted((row for row, s in enumerate(dataset.splits) if s == split), key=order.__getitem__)
        for number, start in enumerate(range(0, len(rows), shard_records)):
            part = rows[start : start + shard_records]
            jobs.append(
                ShardJob(
                    out=out,
                    name=f"{split}-{number:06d}.tar",
                    names=names,
                    kinds=kinds,
                    keys=[dataset.keys[row] for row in part],
                    locations=[dataset.locations[row] for row in part],
                    labels=dataset.labels[part],
                    places=[dataset.places[row] for row in part],
                    read=dataset.read,
                    skip_bad=skip_bad,
                    check=check,
                )
            )
    return jobs


def prepare(
    dataset: Dataset,
    out: Path | str,
    *,
    shard_records: int = 4096,
    workers: int | None = None,
    skip_bad: bool = False,
    check: Check = "full",
    progress: Progress = silent,
) -> ShardSet:
    """Write a shard set, or go on with one that was interrupted. Every byte is the same however often that happens.

    Args:
        dataset: the index of what to write.
        out: a folder that is absent, empty, or holds an unfinished set of the same source.
        shard_records: records a tar.
        workers: processes; None: one a core.
        skip_bad: leave out pictures that are missing or cannot be decoded and list them in dataset.json.
        check: how each picture is proven to be sound; see `images.check`. The set is the same.
        progress: called now and then with (records done, records in all).

    Returns:
        The finished set; also when it was finished before.

    Raises:
        ValueError: the folder holds something else, another process is writing to it, or a picture is bad; the message
            names file and line.
    """
    out = Path(out)
    source = source_digest(dataset, shard_records, workers)
    claim(out)
    with owned(out / WORK / "lock", str(out)):
        finished = finished_set(out, source)
        if finished is not None:
            logger.info("%s is already complete; nothing to do", out)
        else:
            for stale in (out / WORK).glob("*.part"):
                stale.unlink()
            jobs = jobs_of(dataset, out, shard_records, skip_bad, check)
            results = each_shard(shard, jobs, workers, progress)
            finished = describe_set(dataset, out, source, shard_records, jobs, results)
        shutil.rmtree(out / WORK)
    return finished


def source_digest(dataset: Dataset, shard_records: int, workers: int | None) -> str:
    """What decides a set's bytes.

    Raises:
        ValueError: it cannot be written so.
    """
    if shard_records < 1 or (workers is not None and workers < 1):
        raise ValueError(f"shard_records {shard_records} and workers {workers} must be at least 1")
    if not len(dataset):
        raise ValueError(f"{dataset.name}: not one record to write; is the source empty?")
    reserved = [e["name"] for e in dataset.attribute_list if e["name"] in (*FIXED_COLUMNS, ORIENTATION)]
    if reserved:
        raise ValueError(f"attribute {reserved[0]!r} is called like a column of the manifest; rename it")
    return hashlib.sha256(f"{FORMAT} {dataset.digest()} {shard_records}".encode()).hexdigest()


def claim(out: Path) -> None:
    """Make the folder, or see that what lies in it is ours."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a folder is needed")
    ours = (out / WORK).is_dir() or (out / DESCRIPTION).is_file()
    foreign = [] if ours or not out.exists() else [p.name for p in out.iterdir() if p.is_file()]
    if foreign:
        raise ValueError(f"{out} holds {foreign[0]} and no shard set; choose a folder that is absent or empty")
    (out / WORK).mkdir(parents=True, exist_ok=True)


def finished_set(out: Path, source: str) -> ShardSet | None:
    """The finished set that lies in `out`, when it is of this source; None when there is none yet."""
    started = out / WORK / "source"
    other = "of another source or shard size; choose another folder, or remove it first"
    if (out / DESCRIPTION).exists():
        finished = ShardSet.open(out)
        if finished.info.get("source_digest") != source:
            shutil.rmtree(out / WORK)
            raise ValueError(f"{out} already holds a finished set {other}")
        return finished
    if started.exists() and started.read_text() != source:
        raise ValueError(f"{out} holds an unfinished set {other}")
    if not started.exists():
        write_whole(started, source)
    return None


def describe_set(
    dataset: Dataset, out: Path, source: str, shard_records: int, jobs: list[ShardJob], results: list[Written]
) -> ShardSet:
    """Write the manifest and dataset.json of shards that are written, each job's result beside it."""
    written = {job.name: result for job, result in zip(jobs, results, strict=True)}
    left_out = [*dataset.left_out, *(entry for job in jobs for entry in written[job.name].left_out)]
    for job in jobs:
        if not written[job.name].rows:
            (out / job.name).unlink()
    jobs = [job for job in jobs if written[job.name].rows]
    if not jobs:
        raise ValueError(f"{dataset.name}: every record is bad, beginning with {left_out[0].reason}")

    import pyarrow.parquet as pq

    table = _manifest(dataset.attribute_list, jobs, written)
    with replacing(out / MANIFEST, out / WORK) as file:
        pq.write_table(table, file)
    info = {
        "format": FORMAT,
        "name": dataset.name,
        "source": dataset.source,
        "source_digest": source,
        "digest": data_digest(dataset.attribute_list, lambda name: [table[name]]),
        "attributes": [{**entry, "k": len(entry["categories"]) or 2} for entry in dataset.attribute_list],
        "shard_records": shard_records,
        "splits": {split: _describe(dataset.attribute_list, split, table, jobs, written) for split in SPLITS},
        "manifest": {"file": MANIFEST, "size": (out / MANIFEST).stat().st_size, "digest": digest_of(out / MANIFEST)},
        "left_out": [entry._asdict() for entry in left_out],
    }
    train = [job.labels[[row[0] for row in written[job.name].rows]] for job in jobs if job.name.startswith("train-")]
    for words in untaught(dataset.attribute_list, np.concatenate(train)) if train else ["there is no record"]:
        logger.warning("train: %s: nothing can be learnt of it", words)
    write_json(out / DESCRIPTION, info, work=out / WORK)
    return ShardSet.open(out)


def _manifest(attribute_list: list[dict[str, Any]], jobs: list[ShardJob], written: dict[str, Written]) -> pa.Table:
    import pyarrow as pa

    rows = [(job, row) for job in jobs for row in written[job.name].rows]
    labels = np.concatenate([job.labels[[row[0] for row in written[job.name].rows]] for job in jobs])
    columns = {
        "key": pa.array([job.keys[row[0]] for job, row in rows], pa.string()),
        "split": pa.array([job.name.partition("-")[0] for job, _ in rows], pa.string()),
        "shard": pa.array([job.name for job, _ in rows], pa.string()),
        "offset": pa.array([row[1] for _, row in rows], pa.int64()),
        "size": pa.array([row[2] for _, row in rows], pa.int64()),
        "digest": pa.array([row[3] for _, row in rows], pa.string()),
        "width": pa.array([row[4] for _, row in rows], pa.int32()),
        "height": pa.array([row[5] for _, row in rows], pa.int32()),
        "extension": pa.array([row[6] for _, row in rows], pa.string()),
        ORIENTATION: pa.array([row[7] for _, row in rows], pa.int8()),
    }
    for j, entry in enumerate(attribute_list):
        kind = np.float32 if entry["kind"] == "continuous" else np.int8
        columns[entry["name"]] = pa.array(np.ascontiguousarray(labels[:, j], kind))
    return pa.table(columns)


def _describe(
    attribute_list: list[dict[str, Any]],
    split: str,
    table: pa.Table,
    jobs: list[ShardJob],
    written: dict[str, Written],
) -> dict[str, Any]:
    """What dataset.json says of a split: records, how many hold each value of each attribute, and its shards."""
    mask = np.array([name == split for name in table["split"].to_pylist()])
    counts: dict[str, dict[str, float]] = {}
    for entry in attribute_list:
        labels = table[entry["name"]].to_numpy()[mask]
        known = labels[labels >= 0]
        if entry["kind"] == "continuous":
            counts[entry["name"]] = {"mean": float(known.mean()) if len(known) else 0.0}
        else:
            values = entry["categories"] or ["0", "1"]
            counts[entry["name"]] = {value: int((known == v).sum()) for v, value in enumerate(values)}
        if len(known) < len(labels):
            counts[entry["name"]]["unknown"] = len(labels) - len(known)
    shards = [
        {
            "file": job.name,
            "records": len(written[job.name].rows),
            "size": written[job.name].size,
            "digest": written[job.name].digest,
        }
        for job in jobs
        if job.name.startswith(f"{split}-")
    ]
    return {"records": int(mask.sum()), "labels": counts, "shards": shards}
