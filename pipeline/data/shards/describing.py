"""Describing a set whose shards are written: the manifest, then dataset.json."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.datasets import SPLITS, Dataset
from pipeline.data.shards.files import DESCRIPTION, FIXED_COLUMNS, FORMAT, MANIFEST, ORIENTATION, WORK
from pipeline.data.shards.manifest import data_digest, labels_of, untaught
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
    left_out = [*dataset.left_out, *(entry for written in results for entry in written.left_out)]
    shards = [(job, written) for job, written in zip(jobs, results, strict=True) if written.rows]
    for name in {job.name for job in jobs} - {job.name for job, _ in shards}:
        (out / name).unlink()
    if not shards:
        raise ValueError(f"{dataset.name}: every record is bad, beginning with {left_out[0].reason}")

    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with ThreadPoolExecutor(_FLUSHING_THREADS) as pool:
        list(pool.map(flush, [out / job.name for job, _ in shards]))
    table, splits = _manifest(dataset.attribute_list, shards), {}
    for split in SPLITS:
        labels = labels_of(table.filter(pc.equal(table["split"], split)), dataset.attribute_list)
        for words in untaught(dataset.attribute_list, labels) if split == "train" and len(labels) else ():
            logger.warning("train: %s: nothing can be learnt of it", words)
        files = [
            {"file": job.name, "records": len(written.rows), "size": written.size, "digest": written.digest}
            for job, written in shards
            if job.name.startswith(split)
        ]
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


def _manifest(attribute_list: list[dict[str, Any]], shards: list[tuple[ShardJob, Written]]) -> pa.Table:
    """The manifest of these shards, one row a record, in the order of the tars."""
    import pyarrow as pa

    kinds = {"offset": pa.int64(), "size": pa.int64(), "digest": pa.string(), "width": pa.int32(), "height": pa.int32()}
    kinds |= {"extension": pa.string(), ORIENTATION: pa.int8()}
    columns: dict[str, list[Any]] = {name: [] for name in (*FIXED_COLUMNS, ORIENTATION)}
    labels = []
    for job, written in shards:
        records, *others = zip(*written.rows)
        columns["key"] += [job.data.keys[record] for record in records]
        columns["split"] += [job.name.partition("-")[0]] * len(records)
        columns["shard"] += [job.name] * len(records)
        for name, values in zip(kinds, others, strict=True):
            columns[name] += values
        labels.append(job.data.labels[list(records)])
    arrays = {name: pa.array(values, kinds.get(name, pa.string())) for name, values in columns.items()}
    for entry, column in zip(attribute_list, np.concatenate(labels).T):
        kind = np.float32 if entry["kind"] == "continuous" else np.int8
        arrays[entry["name"]] = pa.array(np.ascontiguousarray(column, kind))
    return pa.table(arrays)


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
