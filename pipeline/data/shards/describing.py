"""Describing a set whose shards are written: the manifest, then dataset.json."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.datasets import SPLITS, Dataset
from pipeline.data.shards.files import DESCRIPTION, FIXED_COLUMNS, FORMAT, MANIFEST, ORIENTATION, WORK
from pipeline.data.shards.manifest import data_digest, untaught
from pipeline.data.shards.reading import ShardSet
from pipeline.data.shards.writing import ShardJob, Written
from pipeline.files import digest_of, flush, replacing, write_json

if TYPE_CHECKING:
    import pyarrow as pa

_FLUSHING_THREADS = 4

logger = logging.getLogger(__name__)


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

    with ThreadPoolExecutor(_FLUSHING_THREADS) as pool:
        list(pool.map(flush, [out / job.name for job in jobs]))
    table, labels = _manifest(dataset.attribute_list, jobs, written)
    splits, start = {}, 0
    for split in SPLITS:
        mine = [job for job in jobs if job.name.startswith(split)]
        count = sum(len(written[job.name].rows) for job in mine)
        splits[split] = _describe(dataset.attribute_list, labels[start : start + count], mine, written)
        start += count
    train = labels[: splits["train"]["records"]]
    for words in untaught(dataset.attribute_list, train) if len(train) else ():
        logger.warning("train: %s: nothing can be learnt of it", words)
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
        "splits": splits,
        "manifest": {"file": MANIFEST, "size": (out / MANIFEST).stat().st_size, "digest": digest_of(out / MANIFEST)},
        "left_out": [entry._asdict() for entry in left_out],
    }
    write_json(out / DESCRIPTION, info, work=out / WORK)
    return ShardSet.open(out)


def _manifest(
    attribute_list: list[dict[str, Any]], jobs: list[ShardJob], written: dict[str, Written]
) -> tuple[pa.Table, np.ndarray]:
    """The manifest, and the labels [N, A] of its rows."""
    import pyarrow as pa

    kinds = {"offset": pa.int64(), "size": pa.int64(), "digest": pa.string(), "width": pa.int32(), "height": pa.int32()}
    kinds |= {"extension": pa.string(), ORIENTATION: pa.int8()}
    columns: dict[str, list[Any]] = {name: [] for name in (*FIXED_COLUMNS, ORIENTATION)}
    labels = []
    for job in jobs:
        places, *others = zip(*written[job.name].rows)
        columns["key"] += [job.keys[place] for place in places]
        columns["split"] += [job.name.partition("-")[0]] * len(places)
        columns["shard"] += [job.name] * len(places)
        for name, values in zip(kinds, others, strict=True):
            columns[name] += values
        labels.append(job.labels[list(places)])
    together = np.concatenate(labels)
    arrays = {name: pa.array(values, kinds.get(name, pa.string())) for name, values in columns.items()}
    for entry, column in zip(attribute_list, together.T):
        kind = np.float32 if entry["kind"] == "continuous" else np.int8
        arrays[entry["name"]] = pa.array(np.ascontiguousarray(column, kind))
    return pa.table(arrays), together


def _describe(
    attribute_list: list[dict[str, Any]], labels: np.ndarray, jobs: list[ShardJob], written: dict[str, Written]
) -> dict[str, Any]:
    """What dataset.json says of a split: records, how many hold each value of each attribute, and its shards."""
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
    shards = [
        {"file": job.name, "records": len(shard.rows), "size": shard.size, "digest": shard.digest}
        for job in jobs
        for shard in (written[job.name],)
    ]
    return {"records": len(labels), "labels": counts, "shards": shards}
