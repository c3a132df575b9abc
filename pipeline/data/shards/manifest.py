"""The manifest of a set: reading it, its labels, its data digest, and what its labels cannot teach."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.datasets import SPLITS
from pipeline.data.shards.files import FIXED_COLUMNS, MANIFEST, ORIENTATION

if TYPE_CHECKING:  # packing processes come by here and need no pyarrow
    import pyarrow as pa

_AT_ONCE = 8192  # rows that are Python objects at a time: each is a hundred bytes and more
_MOST_WORDS = 1 << 24  # in one array of Arrow's, which may hold 2 GiB; the longest are keys of 90 letters


def shards_of(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in SPLITS for shard in info["splits"][split]["shards"]]


def read_manifest(folder: Path, info: Mapping[str, Any], split: str | None = None) -> pa.Table:
    """The rows of one split of the set in a folder, or of all of them. info: its dataset.json. Raises ValueError: a
    column is missing, the file is damaged, or a row of whichever split points outside its tar."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path, names = folder / MANIFEST, [entry["name"] for entry in info["attributes"]]
    try:
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            turned = [ORIENTATION] if ORIENTATION in file.schema_arrow.names and ORIENTATION not in names else []
            table = file.read().select([*FIXED_COLUMNS, *turned, *names])  # older sets lack the orientation
        limit = numbered(table["shard"], {shard["file"]: shard["size"] for shard in shards_of(info)})
        offset, size = table["offset"].to_numpy(), table["size"].to_numpy()
        if ((offset < 0) | (size < 0) | (offset + size > limit)).any():
            raise ValueError(f"{path} points outside the tars; remove {folder} and run 'fader prepare' again")
        return table if split is None else table.filter(pc.equal(table["split"], split))
    except (pa.ArrowException, KeyError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def labels_of(table: pa.Table, attribute_list: Sequence[Mapping[str, Any]]) -> np.ndarray:
    labels = np.empty((len(table), len(attribute_list)), np.float32)
    for j, entry in enumerate(attribute_list):
        labels[:, j] = table[entry["name"]].to_numpy()
    return labels


def manifest_of(
    attribute_list: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[Any]], labels: np.ndarray
) -> pa.Table:
    """The manifest of all records from its columns and their labels [n, A].

    Arrow's own conversions from Python and to NumPy load pandas, which takes longer than to write 5,000 records.
    """
    import pyarrow as pa

    kinds = dict(offset=np.int64, size=np.int64, width=np.int32, height=np.int32) | {ORIENTATION: np.int8}
    numbers = {name: np.array(columns[name], kind) for name, kind in kinds.items()}
    for entry, column in zip(attribute_list, labels.T, strict=True):
        numbers[entry["name"]] = column.astype(np.float32 if entry["kind"] == "continuous" else np.int8)
    arrays = {name: _words(columns[name]) for name in (*FIXED_COLUMNS, ORIENTATION) if name not in kinds}
    for name, column in numbers.items():
        arrays[name] = pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), len(column), [None, pa.py_buffer(column)])
    names = [*FIXED_COLUMNS, ORIENTATION, *(entry["name"] for entry in attribute_list)]
    return pa.Table.from_arrays([arrays[name] for name in names], names)


def _words(words: Sequence[str]) -> pa.ChunkedArray:
    """Return ASCII words as a column of Arrow's."""
    import pyarrow as pa

    pieces = []
    for start in range(0, len(words), _MOST_WORDS):
        piece = words[start : start + _MOST_WORDS]
        ends = np.cumsum([0, *map(len, piece)], dtype=np.int32)
        buffers = [None, pa.py_buffer(ends), pa.py_buffer("".join(piece).encode())]
        pieces.append(pa.Array.from_buffers(pa.string(), len(piece), buffers))
    return pa.chunked_array(pieces, pa.string())


def untaught(attribute_list: Sequence[Mapping[str, Any]], labels: np.ndarray) -> list[str]:
    """What the labels [n, A] of training records cannot teach, in words: an attribute of which they have one value only,
    and each value of a k-way attribute that none of them has."""
    said = []
    for entry, column in zip(attribute_list, labels.T, strict=True):
        names = list(entry["categories"]) or ["0", "1"]
        known = np.unique(column[column >= 0]).tolist()
        if len(known) < 2:
            value = f"{known[0]:g}" if known and entry["kind"] == "continuous" else names[int(known[0])] if known else "unknown"
            said.append(f"{entry['name']} is {value} in every record")
        elif entry["kind"] == "k-way" and len(known) < len(names):
            lacks = ", ".join(name for number, name in enumerate(names) if number not in known)
            said.append(f"no record has {entry['name']} = {lacks}")
    return said


def numbered(column: pa.ChunkedArray, known: Mapping[str, int]) -> np.ndarray:
    """Each string's number, [n] int64; -1 for a string that has none."""
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    values = np.array([known.get(name, -1) for name in encoded.dictionary.to_pylist()], np.int64)
    return values[encoded.indices.to_numpy()] if len(encoded) else np.zeros(0, np.int64)


def data_digest(attribute_list: Sequence[Mapping[str, Any]], table: pa.Table) -> str:
    """sha256 of what the data is: attributes, and each record's key, split, picture digest and labels, in order."""
    digest = hashlib.sha256(json.dumps([[e["name"], e["kind"], e["categories"]] for e in attribute_list]).encode())
    for column in ("key", "split", "digest"):
        for start in range(0, len(table), _AT_ONCE):
            words = "\n".join(table[column].slice(start, _AT_ONCE).to_pylist())
            digest.update(("\n" if start else "").encode() + words.encode())
    for entry in attribute_list:
        kind = "<f4" if entry["kind"] == "continuous" else "<i1"
        digest.update(np.from_dlpack(table[entry["name"]].combine_chunks()).astype(kind).tobytes())
    return digest.hexdigest()
