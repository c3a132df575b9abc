"""Any CSV or Parquet file with a column of picture paths; its other columns are attributes."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.datasets.columns import Column, choose, is_unknown, plain, text_of
from pipeline.data.datasets.record import Dataset, Faults, key_fault, key_from_name
from pipeline.data.datasets.source import Place, Reader, describe_missing
from pipeline.data.datasets.splits import NAMES, Shares, assign

INDEX_NAMES = ("Unnamed: 0", "__index_level_0__")
"""What pandas calls an index that has no name, when it reads one from a CSV or writes one to Parquet: no attribute."""
_LONGEST_LINE = 1 << 20
_DELIMITER = re.compile(r'"?sep=(.)"?\s*')

Row = tuple[int, Sequence[Any]]
"""(line or row number as a person counts it, cells)"""


@dataclass
class Rows:
    """The light index while it grows: one entry a record in each list, one cell in each column.

    grouped: records of one group stand in one split; a record whose group is unknown stands alone.
    """

    faults: Faults
    columns: list[Column]
    grouped: bool = False
    keys: list[str] = field(default_factory=list)
    locations: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    splits: list[str | None] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)

    def add(
        self, key: str, location: str, place: str, cells: Sequence[Any], split: str | None = None, group: str = ""
    ) -> bool:
        """Take one record, unless it is wrong. split: as the set calls it, None when the set gives none."""
        fault = key_fault(key)
        if fault:
            self.faults.add(key, place, f"key {key[:100]!r} {fault}")
            return False
        given = None if split is None else NAMES.get(plain(split).lower())
        if split is not None and given is None:
            self.faults.add(key, place, f"split is {split!r}; train, valid or test is needed")
            return False
        self.keys.append(key)
        self.locations.append(location)
        self.places.append(place)
        self.splits.append(given)
        if self.grouped:
            self.groups.append(None if is_unknown(group) else plain(group))
        for column, cell in zip(self.columns, cells, strict=True):
            column.add(cell)
        return True

    def dataset(self, name: str, source: dict[str, Any], read: Any, shares: Shares | None) -> Dataset:
        """The index, without records whose cells are wrong or whose key an earlier record has."""
        labels, entries, bad = np.zeros((len(self.keys), len(self.columns)), np.float32), [], {}
        for j, column in enumerate(self.columns):
            entry, labels[:, j], wrong = column.finish()
            entries.append(entry)
            bad |= wrong
        first: dict[str, int] = {}
        for row, key in enumerate(self.keys):
            if row not in bad and first.setdefault(key, row) != row:
                bad[row] = f"key {key[:100]!r} stands at {self.places[first[key]]} already"
        for row in sorted(bad):
            self.faults.add(self.keys[row], self.places[row], bad[row])
        rows = [row for row in range(len(self.keys)) if row not in bad]
        keys, locations, places, given = (
            [part[row] for row in rows] for part in (self.keys, self.locations, self.places, self.splits)
        )
        groups = [self.groups[row] for row in rows] if self.grouped else None
        splits, how = assign(keys, given=None if None in given else given, groups=groups, shares=shares)
        return Dataset(
            name=name,
            source={**source, "split": how},
            attribute_list=entries,
            keys=keys,
            splits=splits,
            locations=locations,
            labels=labels[rows],
            places=places,
            read=read,
            left_out=self.faults.left_out,
        )


def read_table(
    source: os.PathLike[str] | str,
    *,
    images: str | None = None,
    path: str = "path",
    key: str | None = None,
    split: str | None = None,
    group: str | None = None,
    attributes: Sequence[str] = (),
    kinds: Sequence[str] = (),
    shares: Shares | None = None,
    skip_bad: bool = False,
    name: str = "table",
) -> Dataset:
    """The index of a CSV (`.csv`, `.tsv`, `.txt`) or Parquet (`.parquet`) file.

    Args:
        source: the file.
        images: folder or address that paths are relative to; by default the file's own.
        path, key, split, group: names of columns. Without `key` the key is made from the path; without `split`, a
            column of that name is taken when there is one; records of one `group` stand in one split.
        attributes: columns to take; none takes every other one.
        kinds: what columns are where it does not follow from their cells; see `columns.Kind`.
        shares: split the records anew, by a hash.
        skip_bad: leave out rows that are wrong, and list them.

    Raises:
        ValueError: not readable, a column is missing, a row is wrong. The message names file and line.
    """
    source = Place(os.fspath(source))
    header, rows = _open(source)
    split = split or next((column for column in header if column.lower() == "split"), None)
    others = [column for column in (path, key, split, group) if column]
    for column in others:
        if column not in header:
            hint = "; name the column of picture paths with --path" if column == path else ""
            raise ValueError(f"{source.name} has no column {column!r}{hint}; it has: {', '.join(header)[:400]}")
    columns = choose(header, attributes, kinds, [*others, *(name for name in header if name in INDEX_NAMES)])
    index = Rows(Faults(skip_bad), columns, grouped=bool(group))
    at = {column: number for number, column in enumerate(header)}
    taken = [at[column.name] for column in columns]
    for number, cells in rows:
        place = f"{source.name} line {number}"
        if len(cells) != len(header):
            index.faults.add(None, place, f"{len(cells)} cells for {len(header)} columns")
            continue
        location = text_of(cells[at[path]])
        if not location or "\0" in location:
            index.faults.add(None, place, f"no picture path in column {path}")
            continue
        name_of = text_of(cells[at[key]]) if key else key_from_name(location)
        if name_of in ("", "nan"):
            index.faults.add(None, place, f"no key in column {key}")
            continue
        index.add(
            name_of,
            location,
            place,
            [cells[column] for column in taken],
            text_of(cells[at[split]]) if split and not shares else None,
            text_of(cells[at[group]]) if group else "",
        )
    base = Place(images) if images else source.parent
    return index.dataset(name, {source.name: _sha256(source)}, Reader(base), shares)


def read_header(source: Place) -> list[str]:
    """Names of the columns of a table.

    Raises:
        ValueError: not readable, or a name is missing or stands twice.
    """
    header, rows = _open(source)
    rows.close()
    return header


def _sha256(place: Place) -> str:
    with place.open() as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(source: Place) -> tuple[list[str], Generator[Row]]:
    if not source.is_file():
        raise describe_missing(source, "table: a CSV or Parquet file is needed")
    if source.name.lower().endswith((".parquet", ".pq")):
        header, rows = _parquet(source)
    else:
        header, rows = _csv(source)
    header[0] = header[0] or INDEX_NAMES[0]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice or not all(header):
        raise ValueError(f"{source.name}: {f'column {twice[0]!r} stands twice' if twice else 'a column has no name'}")
    return header, rows


def _csv(source: Place) -> tuple[list[str], Generator[Row]]:
    rows = _csv_rows(source)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{source.name} is empty; a header with the names of the columns is needed")
    return [cell.strip() for cell in first[1]], rows


def _csv_rows(source: Place) -> Generator[Row]:
    """The rows of a CSV one by one, the header first."""
    with source.open() as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:

        def lines() -> Iterator[str]:
            while line := text.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise ValueError(f"a line has more than {_LONGEST_LINE:,} characters")
                yield line

        number = before = 0
        try:
            first = text.readline(_LONGEST_LINE)
            said = _DELIMITER.fullmatch(first)  # a line of Excel's own, before the header
            if said:
                before = 1
            else:
                text.seek(0)
            reader = csv.reader(lines(), delimiter=said[1] if said else max(",;\t", key=first.count), strict=True)
            for cells in reader:
                number = reader.line_num + before
                if cells:
                    yield number, cells
        except (csv.Error, UnicodeDecodeError, ValueError) as error:
            what = "a byte is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
            raise ValueError(f"{source.name}, after line {number}: {what}; is it a CSV file?") from error


def _parquet(source: Place) -> tuple[list[str], Generator[Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = source.open()
    try:
        table = pq.ParquetFile(file)
        header = list(table.schema_arrow.names)
    except (pa.ArrowException, OSError) as error:
        file.close()
        raise ValueError(f"{source.name} is not readable as Parquet: {error}") from error

    def rows() -> Generator[Row]:
        number = 0
        try:
            with file:
                for batch in table.iter_batches(4096):
                    for cells in zip(*(column.to_pylist() for column in batch.columns)):
                        number += 1
                        yield number, cells
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{source.name}, after row {number}: not readable as Parquet: {error}") from error

    return header, rows()
