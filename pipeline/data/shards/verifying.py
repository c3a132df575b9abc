"""Reading a shard set back whole, and holding every byte against its description."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.datasets.source import is_remote
from pipeline.data.datasets.workers import Progress, silent, spread, tick
from pipeline.data.remote import Remote
from pipeline.data.shards.files import BLOCK, DESCRIPTION, MANIFEST, header, label_members, member_json, sha256
from pipeline.data.shards.manifest import data_digest, labels_of, numbered, shards_of
from pipeline.data.shards.reading import ShardSet, mapped, read_description, size_fault
from pipeline.files import digest_of

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Report:
    """What `verify` read."""

    records: int
    shards: int
    size: int


def _verify_shard(attribute_list: list[dict[str, Any]], remote: Remote | None, job: tuple[Path, dict, pa.Table]) -> list[str]:
    """What is damaged in one tar, of which dataset.json and the manifest speak; one that rotted in the cache is fetched anew."""
    path, shard, rows = job
    faults = _faults(path, shard, attribute_list, rows, remote)
    if faults and remote and path.exists():
        path.unlink()
        faults = _faults(path, shard, attribute_list, rows, remote)
    return faults


def _faults(path: Path, shard: dict, attribute_list: list[dict], rows: pa.Table, remote: Remote | None) -> list[str]:
    """What is damaged in one tar. All of it follows from the manifest; of the pictures their digests do."""
    name, position, faults = path.name, 0, list[str]()
    fault = None if remote else size_fault(path, shard["size"])
    if fault:
        return [fault]
    try:
        tar = mapped(path, remote)
    except ValueError as error:
        return [str(error)]
    columns = [rows[column].to_pylist() for column in ("key", "offset", "size", "digest", "extension")]
    names, kinds = ([entry[what] for entry in attribute_list] for what in ("name", "kind"))
    members = label_members(names, kinds, labels_of(rows, attribute_list))
    for key, offset, size, digest, extension, labels in zip(*columns, members, strict=True):
        tick()
        if offset != position + BLOCK:
            return [*faults, f"{name}: the manifest has {key} at byte {offset:,}, where it does not follow the record before"]
        if tar[position:offset].tobytes() != header(f"{key}.{extension}", size):
            faults.append(f"{name}: the header of {key}.{extension} is damaged")
        end = offset + size + -size % BLOCK
        if sha256(tar[offset : offset + size]) != digest or tar[offset + size : end].any():
            faults.append(f"{name}: {key}.{extension} differs from its digest")
        member = member_json(key, labels)
        position = end + len(member)
        if tar[end:position].tobytes() != member:
            faults.append(f"{name}: {key}.json differs from the labels in the manifest")
    if len(tar) < position + 2 * BLOCK or tar[position:].any():
        faults.append(f"{name}: the end of the tar is damaged")
    if not faults and sha256(tar) != shard["digest"]:
        faults.append(f"{name} differs from its digest in {DESCRIPTION}")
    return faults


def verify(path: Path | str, *, workers: int | None = None, progress: Progress = silent) -> Report:
    """Read a set back whole: every picture against its digest, every label file against the columns, every tar, the
    manifest and the data digest against dataset.json. What the cache lacks of a set at an address is fetched. Raises
    ValueError: not there, not finished, or damaged; names what is (the first 20 places)."""
    remote = ShardSet.open(path).remote if is_remote(path) else None
    path = remote.folder if remote else Path(path).expanduser()
    info = read_description(path)
    shards = shards_of(info)
    fault = size_fault(path / MANIFEST, info["manifest"]["size"])
    if fault or digest_of(path / MANIFEST) != info["manifest"]["digest"]:
        raise ValueError(f"{path} is damaged: {fault or f'{MANIFEST} differs from its digest in {DESCRIPTION}'}")
    table = ShardSet(path, info, remote).manifest
    numbers = numbered(table["shard"], {shard["file"]: number for number, shard in enumerate(shards)})
    numbers, first, counts = np.unique(numbers, return_index=True, return_counts=True)
    rows_of = {number: np.arange(start, start + count) for number, start, count in zip(numbers.tolist(), first, counts)}
    jobs = [(path / shard["file"], shard, table.take(rows_of.get(n, np.arange(0)))) for n, shard in enumerate(shards)]
    verify_shard = partial(_verify_shard, info["attributes"], remote)
    faults = [fault for part in spread(verify_shard, jobs, workers, len(table), progress) for fault in part]
    if data_digest(info["attributes"], table) != info["digest"]:
        faults.append(f"{MANIFEST} does not give the data digest in {DESCRIPTION}")
    known = {shard["file"] for shard in shards}
    faults += [f"{p.name} does not belong to the set" for p in sorted(path.glob("*.tar")) if p.name not in known]
    if faults:
        more = f" and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError(f"{path} is damaged in {len(faults)} places: {'; '.join(faults[:20])}{more}")
    return Report(len(table), len(shards), sum(shard["size"] for shard in shards))
