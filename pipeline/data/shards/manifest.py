"""Reading manifest.parquet a few thousand rows at a time, and the data digest.

As a table of its own, a manifest would take several times what a split keeps of it: 150 MB at 200,000 records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.shards.files import FIXED_COLUMNS, MANIFEST, ORIENTATION

if TYPE_CHECKING:  # packing processes come by here and need no pyarrow
    import pyarrow as pa

_AT_ONCE = 8192  # rows that are Python objects at a time: each is a hundred bytes and more

Chunks = Callable[[str], Iterable["pa.Array | pa.ChunkedArray"]]
"""The values of a column, in order, in pieces."""


class Manifest:
    """A manifest's rows, some thousand at a time.

    Args:
        path: the folder of the shard set.
        attribute_list: as dataset.json has it.
        sizes: bytes of each tar, by file name.
    """

    def __init__(self, path: Path, attribute_list: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> None:
        self.path = path / MANIFEST
        self.attribute_list = attribute_list
        self.names = [entry["name"] for entry in attribute_list]
        self.sizes = sizes

    def parts(self, columns: Sequence[str] | None = None, split: str | None = None) -> Iterator[pa.RecordBatch]:
        """Rows of all splits or of one, some thousand at a time. columns: all by default.

        Raises:
            ValueError: a column is missing; the file is damaged; or, when all columns are read, a row of whichever split
                points outside its tar.
        """
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path, memory_map=True, pre_buffer=False) as file:
                wanted = self._columns(file.schema_arrow) if columns is None else [*columns]
                read = [*wanted, "split"] if split is not None and "split" not in wanted else wanted
                missing = [name for name in read if name not in file.schema_arrow.names]
                if missing:
                    raise KeyError(f"no column {', '.join(missing)}")
                for part in file.iter_batches(_AT_ONCE, columns=read):
                    if columns is None:
                        self._check(part)
                    part = part if split is None else part.filter(pc.equal(part["split"], split))
                    if part.num_rows:
                        yield part.select(wanted)
        except (pa.ArrowException, KeyError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error
        finally:
            pa.default_memory_pool().release_unused()

    def table(self) -> pa.Table:
        """The whole manifest at once.

        Raises:
            ValueError: as `parts`.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        parts = list(self.parts())
        if not parts:
            schema = pq.read_schema(self.path)
            return schema.empty_table().select(self._columns(schema))
        return pa.Table.from_batches(parts)

    def _columns(self, schema: pa.Schema) -> list[str]:
        """Names of all columns; older sets lack the one of the orientation."""
        turned = [ORIENTATION] if ORIENTATION in schema.names and ORIENTATION not in self.names else []
        return [*FIXED_COLUMNS, *turned, *self.names]

    def data_digest(self, split: str) -> str:
        """The data digest of one split's records alone."""
        return data_digest(self.attribute_list, lambda name: (part[name] for part in self.parts([name], split)))

    def _check(self, part: pa.RecordBatch) -> None:
        limit = numbered(part["shard"], self.sizes)
        offset, size = numbers(part["offset"]), numbers(part["size"])
        if ((offset < 0) | (size < 0) | (offset + size > limit)).any():
            raise ValueError(
                f"{self.path} points outside the tars; remove {self.path.parent} and run 'fader prepare' again"
            )


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


def numbers(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)


def numbered(column: pa.Array, known: Mapping[str, int]) -> np.ndarray:
    """Each string's number, [n] int64; -1 for a string that has none."""
    encoded = column.dictionary_encode(null_encoding="encode")
    values = np.array([known.get(name, -1) for name in encoded.dictionary.to_pylist()], np.int64)
    return values[encoded.indices.to_numpy()] if len(encoded) else np.zeros(0, np.int64)


def data_digest(attribute_list: Sequence[Mapping[str, Any]], chunks: Chunks) -> str:
    """sha256 of what the data is: attributes, and each record's key, split, picture digest and labels, in order."""
    digest = hashlib.sha256(json.dumps([[e["name"], e["kind"], e["categories"]] for e in attribute_list]).encode())
    for column in ("key", "split", "digest"):
        between = ""
        for chunk in chunks(column):
            for start in range(0, len(chunk), _AT_ONCE):
                digest.update((between + "\n".join(chunk.slice(start, _AT_ONCE).to_pylist())).encode())
                between = "\n"
    for entry in attribute_list:
        kind = "<f4" if entry["kind"] == "continuous" else "<i1"
        for chunk in chunks(entry["name"]):
            digest.update(chunk.to_numpy(zero_copy_only=False).astype(kind).tobytes())
    return digest.hexdigest()
