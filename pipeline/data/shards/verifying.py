"""Reading a shard set back whole, and holding every byte against its description."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.data.datasets.source import is_remote
from pipeline.data.datasets.workers import Progress, silent, spread, tick
from pipeline.data.remote import Remote
from pipeline.data.shards.files import BLOCK, DESCRIPTION, MANIFEST, header, label_members, member_json, sha256
from pipeline.data.shards.manifest import data_digest
from pipeline.data.shards.reading import ShardSet, read_description, shards_of, size_fault
from pipeline.files import digest_of

_OPEN_TRIALS = 20


@dataclass(frozen=True)
class Report:
    """What `verify` read."""

    records: int
    shards: int
    size: int


@dataclass(frozen=True)
class _VerifyJob:
    """One tar to check: what dataset.json and the manifest say of it. rows: (key, offset, size, digest, extension)."""

    path: Path
    size: int
    digest: str
    names: list[str]
    kinds: list[str]
    rows: list[tuple[str, int, int, str, str]]
    labels: np.ndarray
    remote: Remote | None = None


def _verify_shard(job: _VerifyJob) -> list[str]:
    """What is damaged in one tar; one that rotted in the cache is fetched anew."""
    faults = _faults(job)
    if faults and job.remote and job.path.exists():
        job.path.unlink()
        faults = _faults(job)
    return faults


def _faults(job: _VerifyJob) -> list[str]:
    """What is damaged in one tar. All of it follows from the manifest; of the pictures their digests do."""
    name, faults, position = job.path.name, [], 0
    try:
        opened = _fetched(job.remote, name) if job.remote else None
    except ValueError as error:
        return [str(error)]
    fault = None if opened else size_fault(job.path, job.size)
    if fault:
        return [fault]
    digest = hashlib.sha256()
    with opened or open(job.path, "rb") as file:

        def take(size: int) -> bytes:
            data = file.read(size)
            digest.update(data)
            return data

        members = label_members(job.names, job.kinds, job.labels)
        for (key, offset, size, expected, extension), labels in zip(job.rows, members, strict=True):
            tick()
            if offset != position + BLOCK:
                return [
                    *faults,
                    f"{name}: the manifest has {key} at byte {offset:,}, where it does not follow the record before",
                ]
            if take(BLOCK) != header(f"{key}.{extension}", size):
                faults.append(f"{name}: the header of {key}.{extension} is damaged")
            picture, padding = take(size), take(-size % BLOCK)
            if sha256(picture) != expected or padding.strip(b"\0"):
                faults.append(f"{name}: {key}.{extension} differs from its digest")
            member = member_json(key, labels)
            if take(len(member)) != member:
                faults.append(f"{name}: {key}.json differs from the labels in the manifest")
            position = file.tell()
        rest = take(job.size - position)
        if len(rest) < 2 * BLOCK or rest.strip(b"\0"):
            faults.append(f"{name}: the end of the tar is damaged")
    if digest.hexdigest() != job.digest and not faults:
        faults.append(f"{name} differs from its digest in {DESCRIPTION}")
    return faults


def _fetched(remote: Remote, name: str) -> BinaryIO:
    """A tar that lies elsewhere, open; fetched if it is not here.

    Raises:
        ValueError: what came is not what the set says of it.
        OSError: it cannot be read, or others take its room as soon as it has come.
    """
    for _ in range(_OPEN_TRIALS):
        with contextlib.suppress(FileNotFoundError):  # another process made room before it was opened
            return open(remote.fetch(name), "rb")
    raise OSError(f"the cache has no room for {name} beside what others read; raise FADER_CACHE_GB")


def verify(path: Path | str, *, workers: int | None = None, progress: Progress = silent) -> Report:
    """Read a set back whole: every picture against its digest, every label file against the columns, every tar, the
    manifest and the data digest against dataset.json. What the cache lacks of a set at an address is fetched.

    Raises:
        ValueError: not there, not finished, or damaged; names what is (the first 20 places).
    """
    remote = ShardSet.open(path).remote if is_remote(path) else None
    path = remote.folder if remote else Path(path).expanduser()
    info = read_description(path)
    shards = shards_of(info)
    fault = size_fault(path / MANIFEST, info["manifest"]["size"])
    if fault or digest_of(path / MANIFEST) != info["manifest"]["digest"]:
        raise ValueError(f"{path} is damaged: {fault or f'{MANIFEST} differs from its digest in {DESCRIPTION}'}")
    whole = ShardSet(path, info, remote)
    jobs = _verify_jobs(whole, shards)
    parts = spread(_verify_shard, jobs, workers, whole.manifest.num_rows, progress)
    faults = [fault for part in parts for fault in part]
    if data_digest(info["attributes"], lambda name: [whole.manifest[name]]) != info["digest"]:
        faults.append(f"{MANIFEST} does not give the data digest in {DESCRIPTION}")
    known = {shard["file"] for shard in shards}
    faults += [f"{p.name} does not belong to the set" for p in sorted(path.glob("*.tar")) if p.name not in known]
    if faults:
        more = f" and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError(f"{path} is damaged in {len(faults)} places: {'; '.join(faults[:20])}{more}")
    return Report(whole.manifest.num_rows, len(shards), sum(shard["size"] for shard in shards))


def _verify_jobs(whole: ShardSet, shards: Iterable[dict[str, Any]]) -> list[_VerifyJob]:
    table, attribute_list = whole.manifest, whole.info["attributes"]
    names = [entry["name"] for entry in attribute_list]
    labels = (
        np.stack([table[name].to_numpy().astype(np.float32) for name in names], 1)
        if names
        else np.zeros((table.num_rows, 0))
    )
    rows_of: dict[str, list[int]] = {shard["file"]: [] for shard in shards}
    for row, shard in enumerate(table["shard"].to_pylist()):
        rows_of[shard].append(row)
    columns = [table[name].to_pylist() for name in ("key", "offset", "size", "digest", "extension")]
    rows = list(zip(*columns))
    return [
        _VerifyJob(
            path=whole.path / shard["file"],
            size=shard["size"],
            digest=shard["digest"],
            names=names,
            kinds=[entry["kind"] for entry in attribute_list],
            rows=[rows[row] for row in rows_of[shard["file"]]],
            labels=labels[rows_of[shard["file"]]],
            remote=whole.remote,
        )
        for shard in shards
    ]
